"""Failures of one of two ranks, or of a loader worker, in real processes: error message and end of the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from faults import overrides
from training import ROOT, TINY, free_port, start_program

CASES = {
    "raise": [*overrides("raise"), "loader.num_workers=0"],
    "exit": [*overrides("exit"), "loader.num_workers=0"],
    "kill": [*overrides("kill"), "loader.num_workers=0"],
    "hang": [*overrides("hang"), "loader.num_workers=0", "hang_timeout=5"],
    "test": [*overrides("hang", "val", after=2), "loader.num_workers=0", "hang_timeout=5", "train.enable=false"],
    "freeze": [*overrides("freeze"), "loader.num_workers=0"],
    "worker": [*overrides("kill"), "loader.num_workers=1", "loader.start_method=forkserver"],
}
MESSAGES = {
    "raise": "waiting for a batch: ValueError: a fault made by the tests",
    "exit": "waiting for a batch: SystemExit: 0",
    "kill": "it stopped sending heartbeats",
    "hang": "waiting for a batch: it hangs: nothing has happened for 5 s",
    "test": "testing, batch 0 of 1: it hangs: nothing has happened for 5 s",
    "freeze": "it stopped sending heartbeats",
    "worker": "a loader worker died (DataLoader worker",
}


class Ranks:
    """Two ranks of `mgvideo run`, started as by a launcher. Rank 1 has a fault."""

    def __init__(self, folder: Path, fault: str, arguments: list[str]) -> None:
        port = free_port()
        self.logs = [folder / f"{fault}_{rank}.log" for rank in range(2)]
        self.processes: list[BaseProcess] = []
        for rank, log in enumerate(self.logs):
            variables = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            environment = {key: str(value) for key, value in variables.items()}
            process = start_program(*TINY, f"output_dir={folder / fault}", *arguments, log=log, environment=environment)
            self.processes.append(process)

    def wait(self, rank: int) -> int | None:
        """Wait until a rank ends and return its exit code."""
        self.processes[rank].join()
        return self.processes[rank].exitcode

    def errors(self, rank: int) -> list[str]:
        """Return the error lines in the log of a rank."""
        return [line for line in self.logs[rank].read_text().splitlines() if line.startswith("error")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, motion_root: str):
    folder = tmp_path_factory.mktemp("faults")
    started = {}
    for fault, arguments in CASES.items():
        started[fault] = Ranks(folder, fault, [*arguments, f"dataset.root={motion_root}"])
        time.sleep(1)
    yield started
    for pair in started.values():
        for process in pair.processes:
            process.kill()


@pytest.mark.parametrize("fault", CASES)
def test_failed_rank_ends_the_other_rank_with_its_message(ranks: dict[str, Ranks], fault: str) -> None:
    assert ranks[fault].wait(0) != 0
    errors = ranks[fault].errors(0)
    assert len(errors) == 1, ranks[fault].logs[0].read_text()
    assert "rank 1 failed first, " in errors[0]
    assert MESSAGES[fault] in errors[0]
    if fault not in ("kill", "freeze"):
        assert ("at step 0 (phase 1, " in errors[0]) == (fault != "test")
        assert ranks[fault].wait(1) != 0


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_restarts_from_the_last_checkpoint(nodes: int, tmp_path: Path, motion_root: str) -> None:
    fault = overrides("kill", rank=1, after=150, once=tmp_path / "fault")
    run = [*TINY, *fault, "loader.num_workers=0", "checkpoint.every_steps=1", "train.evals_per_phase=0", "output_dir=o"]
    run += [f"dataset.root={motion_root}"]
    # Each node's agent counts its own restarts: with two nodes, only the agent of the killed rank counts one.
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}"]
    torchrun += ["--max-restarts=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    command = [sys.executable, *torchrun, "--local-addr=localhost", str(ROOT / "tools/run_net.py"), *run]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    log = tmp_path / "log"
    with open(log, "w") as file:
        agents = [
            subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file) for _ in range(nodes)
        ]
    try:
        assert [agent.wait() for agent in agents] == [0] * nodes, log.read_text()
    finally:
        for agent in agents:
            agent.terminate()  # this also ends its ranks
    assert "resumed at step" in log.read_text()
    assert (tmp_path / "o" / "test.json").exists()
