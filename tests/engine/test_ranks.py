"""The same training on one rank and on several: real processes over gloo, in float64 to tell rounding from error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from training import SERVED, free_port, metrics, tiny_plan, tiny_trainer

from mgvideo.distributed.process_group import process_group
from mgvideo.errors import NonFiniteError
from mgvideo.loading.workers import start_fork_server
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint

pytestmark = pytest.mark.numeric

# At a base batch of 8 the plan's last phase holds one BN group, which two ranks synchronise; at 16 clips every rank
# holds whole groups in every phase.
BATCHES = (8, 16)
# Two ranks hold one and two of the three BN groups of 24 clips, and share the one group of 8.
PRECISE_BATCHES = (8, 24)

Job = tuple[str, int, "str | None"]  # a run's name, its base batch, and the run from whose middle it starts


@contextmanager
def as_rank(rank: int, world: int, port: int) -> Iterator[None]:
    """Be a rank of several."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        with process_group(timeout_s=60):
            yield


def train(rank: int, world: int, port: int, folder: Path, motion_root: str, jobs: list[Job]) -> None:
    """Train one run after the other, each in its folder."""
    with as_rank(rank, world, port):
        for run, batch, before in jobs:
            plan = tiny_plan("long", batch_size=batch, epochs=0.75 * batch, lr_milestones=(), lr=0.01)
            place = folder / run / str(batch)
            trainer = tiny_trainer(place, motion_root, plan, double=True, validate=batch == 8, log_every=1)
            if before:
                checkpoints = Checkpoints(folder / before / str(batch) / "checkpoints")
                trainer.load(read_checkpoint(checkpoints.path(checkpoints.steps()[0])))
            trainer.train()
            trainer.monitor.close()
            torch.save(trainer.model.state_dict(), place / f"rank{rank}.pt")
        for batch in PRECISE_BATCHES:
            options = {"micro_batch_clips": 16, "precise_bn_clips": 48}
            plan = tiny_plan("baseline", batch_size=batch)
            trainer = tiny_trainer(folder / "precise", motion_root, plan, double=True, **options)
            trainer.precise_bn()
            trainer.monitor.close()
            torch.save(trainer.model.state_dict(), folder / f"precise_{batch}_{rank}_of_{world}.pt")


TWO: list[Job] = [*(("two", batch, None) for batch in BATCHES), ("one_then_two", 8, "one")]
ONE_AGAIN: list[Job] = [("two_then_one", 8, "two")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Path:
    """The folder of all runs, on one rank, on two, and on one again."""
    port, folder = free_port(), tmp_path_factory.mktemp("runs")
    train(0, 1, port, folder, motion_root, [("one", batch, None) for batch in BATCHES])
    start_fork_server(SERVED)
    mp.start_processes(train, (2, port, folder, motion_root, TWO), nprocs=2, start_method="forkserver")
    train(0, 1, port, folder, motion_root, ONE_AGAIN)
    return folder


def test_two_ranks_train_as_one_does_also_from_the_middle_on(runs: Path) -> None:
    for run, batch, before in (*TWO, *ONE_AGAIN):
        losses, found = metrics(runs / "one" / str(batch)), metrics(runs / run / str(batch))
        start = min(found) - 1
        assert 5 <= start <= 10 if before else start == 0
        assert found == pytest.approx({step: losses[step] for step in range(start + 1, 21)}, rel=1e-8)
        one, two = (torch.load(runs / name / str(batch) / "rank0.pt") for name in ("one", run))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        if run != "two_then_one":
            other = torch.load(runs / run / str(batch) / "rank1.pt")
            assert all(torch.equal(value, two[name]) for name, value in other.items()), "ranks drifted apart"
    validation = metrics(runs / "one/8", "val_top1")
    assert len(validation) == 4
    assert metrics(runs / "two/8", "val_top1") == validation


def lose_on_one(rank: int, world: int, port: int, folder: Path, motion_root: str) -> None:
    """Train where the loss of rank 1 alone is infinite in step 2, with gradients that are finite."""
    with as_rank(rank, world, port):
        plan = tiny_plan("baseline")
        trainer = tiny_trainer(folder, motion_root, plan, checkpoint_every=1, log_every=4)
        loss, calls = trainer.task.loss, 0

        def infinite(logits: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(logits, labels) + (float("inf") if rank == 1 and calls == 3 else 0)

        trainer.task.loss = infinite  # type: ignore[method-assign]
        with pytest.raises(NonFiniteError) as refusal:
            trainer.train()
        trainer.monitor.close()
        (folder / f"{rank}.txt").write_text(str(refusal.value))


def test_a_loss_that_is_infinite_on_one_rank_ends_all_before_a_checkpoint(tmp_path: Path, motion_root: str) -> None:
    start_fork_server(SERVED)
    ranks = (2, free_port(), tmp_path, motion_root)
    mp.start_processes(lose_on_one, ranks, nprocs=2, start_method="forkserver")
    lines = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert lines[0] == lines[1]
    assert "not finite at step 2 " in lines[0]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1, 2]


@pytest.mark.parametrize("batch", PRECISE_BATCHES)
def test_precise_bn_of_two_ranks_is_that_of_one(runs: Path, batch: int) -> None:
    one, *two = (torch.load(runs / f"precise_{batch}_{rank}.pt") for rank in ("0_of_1", "0_of_2", "1_of_2"))
    names = [name for name in one if name.endswith(("running_mean", "running_var"))]
    assert len(names) > 8
    for name in names:
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], one[name], rtol=1e-9, atol=1e-12)
