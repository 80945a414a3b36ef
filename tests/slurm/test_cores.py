"""How ranks of a real SLURM share cores under different CPU bindings."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from cluster import Cluster

PROBE = [sys.executable, str(Path(__file__).with_name("probe.py"))]
CASES = {  # -N1, because masks count the tasks of a node, and two nodes have room for all cases at once
    "bound": ("-N1 -n2 -c1 --cpu-bind=cores", ["1", "1"]),
    "sharing": ("-N1 -n2 -c1 --cpu-bind=mask_cpu:0x3,0x3", ["1", "1"]),
    "overlapping": ("-N1 -n2 -c2 --cpu-bind=mask_cpu:0x1,0x3", ["1/2", "3/2"]),
    "unbound": ("-n1 -c1 --cpu-bind=none", ["1"]),  # SLURM allots one core to it, while it may run on all
    "alone": ("-n1 -c2 --cpu-bind=cores", ["2"]),
}


@pytest.fixture(scope="module")
def ranks_by_case(slurm: Cluster) -> dict[str, list[dict]]:
    """Return the output of each case's ranks. The cases run side by side."""
    if not os.sched_getaffinity(0) >= {0, 1}:
        pytest.skip("CPU binding needs the cores 0 and 1")
    processes = {
        name: subprocess.Popen(
            ["srun", *arguments.split(), *PROBE], env=slurm.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name, (arguments, _) in CASES.items()
    }
    printed = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {err.decode()}"
        printed[name] = sorted(map(json.loads, out.splitlines()), key=lambda rank: rank["rank"])
    return printed


@pytest.mark.parametrize("name", CASES)
def test_ranks_share_cores_by_their_binding(ranks_by_case: dict[str, list[dict]], name: str) -> None:
    _, expected = CASES[name]
    assert [rank["cores"] for rank in ranks_by_case[name]] == expected
    assert [rank["workers"] for rank in ranks_by_case[name]] == [max(1, int(Fraction(cores))) for cores in expected]
    assert {rank["ranks"] for rank in ranks_by_case[name]} == {len(expected)}


def test_a_command_in_an_interactive_srun_shell_is_a_single_process(slurm: Cluster) -> None:
    """srun starts the shell twice; only the first has the terminal."""
    shell = ["srun", "-n2", "--pty", "bash", "--norc", "-i"]
    terminal, shell_end = pty.openpty()
    process = subprocess.Popen(
        shell, env=slurm.environment, stdin=shell_end, stdout=shell_end, stderr=shell_end, start_new_session=True
    )
    os.close(shell_end)
    os.write(terminal, f"{shlex.join(PROBE)}; exit\n".encode())
    printed, deadline = b"", time.monotonic() + 120
    while process.poll() is None and b'"ranks"' not in printed:
        assert time.monotonic() < deadline, printed
        if select.select([terminal], [], [], 0.2)[0]:
            printed += os.read(terminal, 4096)
    process.kill()
    process.wait()
    os.close(terminal)
    assert b'"rank": 0, "ranks": 1' in printed, printed
