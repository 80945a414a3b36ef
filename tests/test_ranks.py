"""The same training on one rank and on several: real processes over gloo, in float64 to tell rounding from error."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from training import metrics, tiny_plan, tiny_trainer

from mgvideo.distributed import joined

# At a base batch of 8 the plan's last phase holds one BN group, which two ranks synchronise; at 16 clips every rank
# holds whole groups in every phase.
BATCHES = (8, 16)


def train(rank: int, world: int, port: int, folder: Path, motion_root: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        with joined(timeout_s=60):
            for batch in BATCHES:
                plan = tiny_plan("long", batch=batch, epochs=0.75 * batch, lr_steps=(0,), lr=0.01)
                trainer = tiny_trainer(
                    folder / str(batch), motion_root, plan, double=True, validate=batch == 8, log_every=1
                )
                trainer.train()
                trainer.monitor.close()
                torch.save(trainer.model.state_dict(), folder / f"{batch}_rank{rank}.pt")


def test_two_ranks_train_as_one_does(tmp_path: Path, motion_root: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    train(0, 1, port, tmp_path / "one", motion_root)
    mp.spawn(train, (2, port, tmp_path / "two", motion_root), nprocs=2)
    for batch in BATCHES:
        runs = (f"one/{batch}_rank0.pt", f"two/{batch}_rank0.pt", f"two/{batch}_rank1.pt")
        one, two, other = (torch.load(tmp_path / run) for run in runs)
        assert all(torch.equal(value, two[name]) for name, value in other.items()), "ranks drifted apart"
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        losses = metrics(tmp_path / "one" / str(batch))
        assert len(losses) == 20
        assert metrics(tmp_path / "two" / str(batch)) == pytest.approx(losses, rel=1e-8)
    validation = metrics(tmp_path / "one/8", "val_top1")
    assert len(validation) == 4
    assert metrics(tmp_path / "two/8", "val_top1") == validation
