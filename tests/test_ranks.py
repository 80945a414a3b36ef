"""The same training on one rank and on several: real processes over gloo, in float64 to tell rounding from error."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from training import metrics, tiny_plan, tiny_trainer

from mgvideo.checkpoint import Checkpoints, read_checkpoint
from mgvideo.distributed import joined

# At a base batch of 8 the plan's last phase holds one BN group, which two ranks synchronise; at 16 clips every rank
# holds whole groups in every phase.
BATCHES = (8, 16)


def train(rank: int, world: int, port: int, folder: Path, motion_root: str, before: Path | None = None) -> None:
    """Train in a folder, from the start or from where the checkpoints of another folder leave it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        with joined(timeout_s=60):
            for batch in BATCHES[:1] if before else BATCHES:
                plan = tiny_plan("long", batch=batch, epochs=0.75 * batch, lr_steps=(0,), lr=0.01)
                trainer = tiny_trainer(
                    folder / str(batch), motion_root, plan, double=True, validate=batch == 8, log_every=1
                )
                if before:
                    checkpoints = Checkpoints(before / str(batch) / "checkpoints")
                    trainer.load(read_checkpoint(checkpoints.path(checkpoints.steps()[0])))
                trainer.train()
                trainer.monitor.close()
                torch.save(trainer.model.state_dict(), folder / f"{batch}_rank{rank}.pt")


def test_two_ranks_train_as_one_does_also_from_the_middle_on(tmp_path: Path, motion_root: str) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    train(0, 1, port, tmp_path / "one", motion_root)
    mp.spawn(train, (2, port, tmp_path / "two", motion_root), nprocs=2)
    # and half of it on the other number of ranks
    train(0, 1, port, tmp_path / "two_then_one", motion_root, tmp_path / "two")
    mp.spawn(train, (2, port, tmp_path / "one_then_two", motion_root, tmp_path / "one"), nprocs=2)
    for batch in BATCHES:
        one = torch.load(tmp_path / f"one/{batch}_rank0.pt")
        losses = metrics(tmp_path / "one" / str(batch))
        assert len(losses) == 20
        for run in ("two", "one_then_two", "two_then_one")[: 3 if batch == BATCHES[0] else 1]:
            resumed = metrics(tmp_path / run / str(batch))
            start = min(resumed) - 1
            assert start == 0 if run == "two" else 5 <= start <= 10
            assert resumed == pytest.approx({step: losses[step] for step in range(start + 1, 21)}, rel=1e-8)
            other = torch.load(tmp_path / run / f"{batch}_rank0.pt")
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            if run != "two_then_one":
                second = torch.load(tmp_path / run / f"{batch}_rank1.pt")
                assert all(torch.equal(value, other[name]) for name, value in second.items()), "ranks drifted apart"
    validation = metrics(tmp_path / "one/8", "val_top1")
    assert len(validation) == 4
    assert metrics(tmp_path / "two/8", "val_top1") == validation
