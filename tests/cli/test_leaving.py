"""Ranks that receive a signal exit together, because launchers kill the other ranks when one exits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from training import ROOT, TINY, free_port, tiny_plan, tiny_trainer

from mgvideo.distributed import process_group as distributed
from mgvideo.distributed.signals import Stopped, defer_signals, handle_signals
from mgvideo.distributed.watchdog import LEAVING, Position


def environment(rank: int, port: int) -> dict[str, str]:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in variables.items()}, "OMP_NUM_THREADS": "1"}


def train_until_signal(rank: int, folder: Path, motion_root: str) -> None:
    """Receive a signal in training and exit. Rank 0 is slow at writing the checkpoint and at exiting."""

    def delay_rank_0(file_name: str) -> None:
        """Sleep on rank 0, then create a file that shows that it is done."""
        if rank == 0:
            time.sleep(4)
            (folder / file_name).touch()

    position = Position()
    with handle_signals(), distributed.process_group(position, timeout_s=60):
        defer_signals()
        trainer = tiny_trainer(folder / "run", motion_root, tiny_plan())
        trainer.checkpoints.on_write = lambda: delay_rank_0("written")
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped) as stop:
            trainer.train()
        assert (folder / "written").exists(), "the rank exits before the checkpoint is written"
        if rank == 0:
            position.report(LEAVING)
        delay_rank_0("left")
        raise stop.value


def run_rank(rank: int, port: int, folder: Path, motion_root: str) -> None:
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    distributed.LEAVE_TIMEOUT_S = 1.5
    with pytest.raises(Stopped):
        train_until_signal(rank, folder, motion_root)
    assert (folder / "left").exists(), "the rank exits before rank 0"


@pytest.mark.slow
def test_ranks_wait_until_rank_0_has_written_and_exits(tmp_path: Path, motion_root: str) -> None:
    mp.spawn(run_rank, (free_port(), tmp_path, motion_root), nprocs=2)


SCONTROL = """#!/bin/sh
echo "$@" >> requeued
echo JobState=RUNNING BatchFlag=1 Requeue=1
"""
# Sends a signal to each rank while it imports torch, as a scheduler may do.
SIGNAL_AT_IMPORT = """
import os, signal, sys

class SignalAtImport:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and "RANK" in os.environ:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, SignalAtImport())
"""


@pytest.mark.slow
def test_job_that_receives_a_signal_while_starting_is_requeued(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SIGNAL_AT_IMPORT)
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    port, command = free_port(), [sys.executable, str(ROOT / "tools/run_net.py"), *TINY, "output_dir=out"]
    extra = {"SLURM_JOB_ID": "7", "PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env={**environment(rank, port), **extra}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [rank.communicate()[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGUSR1] * 2, errors
    assert (tmp_path / "requeued").read_text().splitlines() == ["-o show job 7", "requeue 7"]
    assert not (tmp_path / "out").exists()
