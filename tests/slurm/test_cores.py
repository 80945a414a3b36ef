"""How ranks that a real SLURM starts share cores, by how it binds them."""

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
CASES = {
    "bound": ("-n2 -c1 --cpu-bind=cores", ["1", "1"]),
    "sharing": ("-n2 -c1 --cpu-bind=mask_cpu:0x3,0x3", ["1", "1"]),
    "overlapping": ("-n2 -c2 --cpu-bind=mask_cpu:0x1,0x3", ["1/2", "3/2"]),
    "unbound": ("-n1 -c1 --cpu-bind=none", ["1"]),  # SLURM gives it one of the cores that it may run on
    "alone": ("-n1 -c2 --cpu-bind=cores", ["2"]),
}


@pytest.fixture(scope="module")
def found(slurm: Cluster) -> dict[str, list[dict]]:
    """What the ranks of each case print; the cases run side by side."""
    if not os.sched_getaffinity(0) >= {0, 1}:
        pytest.skip("binding needs the cores 0 and 1")
    started = {
        name: subprocess.Popen(
            ["srun", *arguments.split(), *PROBE], env=slurm.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for name, (arguments, _) in CASES.items()
    }
    printed = {}
    for name, process in started.items():
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, f"{name}: {err.decode()}"
        printed[name] = sorted(map(json.loads, out.splitlines()), key=lambda rank: rank["rank"])
    return printed


@pytest.mark.parametrize("name", CASES)
def test_ranks_share_only_the_cores_that_both_may_run_on(found: dict[str, list[dict]], name: str) -> None:
    _, expected = CASES[name]
    assert [rank["cores"] for rank in found[name]] == expected
    assert [rank["workers"] for rank in found[name]] == [max(1, int(Fraction(cores))) for cores in expected]
    assert {rank["ranks"] for rank in found[name]} == {len(expected)}


def test_a_command_typed_into_a_shell_of_srun_is_a_run_of_its_own(slurm: Cluster) -> None:
    """srun starts the shell twice, and only the first has the terminal."""
    shell = ["srun", "-n2", "--pty", "bash", "--norc", "-i"]
    terminal, other = pty.openpty()
    process = subprocess.Popen(
        shell, env=slurm.environment, stdin=other, stdout=other, stderr=other, start_new_session=True
    )
    os.close(other)
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
