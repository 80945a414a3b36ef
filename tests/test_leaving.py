"""Ranks that are asked to stop leave together: a launcher that sees one leave ends the others."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from training import free_port, tiny_plan, tiny_trainer

from mgvideo import distributed
from mgvideo.signals import Stopped, defer, listening
from mgvideo.watch import LEAVING, at


def environment(rank: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in names.items()}, "OMP_NUM_THREADS": "1"}


def asked(rank: int, folder: Path, motion_root: str) -> None:
    """Stop in training, then at another place; rank 0 is slow at both, and leaves a file when it is done."""

    def slowly(done: str) -> None:
        if rank == 0:
            time.sleep(4)
            (folder / done).touch()

    with listening(), distributed.joined(timeout_s=60):
        defer()
        trainer = tiny_trainer(folder / "run", motion_root, tiny_plan())
        trainer.checkpoints.written = lambda: slowly("written")
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped) as stop:
            trainer.train()
        assert (folder / "written").exists(), "left before the checkpoint was written"
        if rank == 0:
            at(LEAVING)
        slowly("left")
        raise stop.value


def leave(rank: int, port: int, folder: Path, motion_root: str) -> None:
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    distributed.PATIENCE = 1.5
    with pytest.raises(Stopped):
        asked(rank, folder, motion_root)
    assert (folder / "left").exists(), "left before rank 0 did"


def test_ranks_wait_for_what_rank_0_writes(tmp_path: Path, motion_root: str) -> None:
    mp.spawn(leave, (free_port(), tmp_path, motion_root), nprocs=2)
