"""Ranks that are asked to stop leave together: a launcher that sees one leave ends the others."""

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
from mgvideo.distributed.watchdog import LEAVING, report_position


def environment(rank: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in names.items()}, "OMP_NUM_THREADS": "1"}


def asked(rank: int, folder: Path, motion_root: str) -> None:
    """Stop in training, then at another place; rank 0 is slow at both, and leaves a file when it is done."""

    def slowly(done: str) -> None:
        if rank == 0:
            time.sleep(4)
            (folder / done).touch()

    with handle_signals(), distributed.process_group(timeout_s=60):
        defer_signals()
        trainer = tiny_trainer(folder / "run", motion_root, tiny_plan())
        trainer.checkpoints.on_write = lambda: slowly("written")
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped) as stop:
            trainer.train()
        assert (folder / "written").exists(), "left before the checkpoint was written"
        if rank == 0:
            report_position(LEAVING)
        slowly("left")
        raise stop.value


def leave(rank: int, port: int, folder: Path, motion_root: str) -> None:
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    distributed.LEAVE_TIMEOUT_S = 1.5
    with pytest.raises(Stopped):
        asked(rank, folder, motion_root)
    assert (folder / "left").exists(), "left before rank 0 did"


def test_ranks_wait_for_what_rank_0_writes(tmp_path: Path, motion_root: str) -> None:
    mp.spawn(leave, (free_port(), tmp_path, motion_root), nprocs=2)


SLURM = """#!/bin/sh
echo "$@" >> requeued
echo JobState=RUNNING BatchFlag=1 Requeue=1
"""
# as a scheduler may do: each rank is asked while it imports torch
ASKED = """
import os, signal, sys

class Asked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and "RANK" in os.environ:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR1)

sys.meta_path.insert(0, Asked())
"""


def test_a_job_that_is_asked_to_stop_while_it_starts_goes_back_into_the_queue(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ASKED)
    (tmp_path / "scontrol").write_text(SLURM)
    (tmp_path / "scontrol").chmod(0o755)
    port, command = free_port(), [sys.executable, str(ROOT / "tools/run_net.py"), *TINY, "output_dir=out"]
    more = {"SLURM_JOB_ID": "7", "PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ranks = [
        subprocess.Popen(command, cwd=tmp_path, env={**environment(rank, port), **more}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate()[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGUSR1] * 2, said
    assert (tmp_path / "requeued").read_text().splitlines() == ["-o show job 7", "requeue 7"]
    assert not (tmp_path / "out").exists()
