"""Training on one rank and on several gives the same: real processes over gloo, in float64 to bound rounding."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from training import PRELOADED_MODULES, free_port, metrics, tiny_plan, tiny_trainer

from mgvideo.distributed.process_group import process_group
from mgvideo.engine.augmentation import Augmentation, AugmentOptions
from mgvideo.engine.freezing import freeze
from mgvideo.errors import NonFiniteError
from mgvideo.loading.workers import start_fork_server
from mgvideo.models.features import find_classifier
from mgvideo.models.small import r2plus1d_small
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint

pytestmark = pytest.mark.numeric

# With a base batch of 8, the last phase of the plan has one BN group, which two ranks share. With 16, every rank has
# whole groups in every phase.
BATCH_SIZES = (8, 16)
# of the runs with the smaller batch
AUGMENTATION = AugmentOptions(randaugment_ops=2, erasing_prob=0.25, mixup_alpha=0.8, cutmix_alpha=1.0)
# Of the three BN groups of 24 clips, two ranks have one and two; they share the single group of 8 clips.
PRECISE_BN_BATCH_SIZES = (8, 24)

Job = tuple[str, int, "str | None"]  # (name of the run, base batch size, run whose first checkpoint it resumes from)


@contextmanager
def as_rank(rank: int, world: int, port: int) -> Iterator[None]:
    """Make this process a rank of `world`."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        with process_group(timeout_s=60):
            yield


def train(rank: int, world: int, port: int, folder: Path, motion_root: str, jobs: list[Job]) -> None:
    """Train the runs one after the other, each in its folder; then run precise BN."""
    with as_rank(rank, world, port):
        for run, batch, resume_from in jobs:
            plan = tiny_plan("long", batch_size=batch, epochs=0.75 * batch, lr_milestones=(), lr=0.01)
            run_folder = folder / run / str(batch)
            torch.manual_seed(0)
            model = r2plus1d_small(8, width=4, dropout=0.3)
            options: dict[str, float] = {}
            if batch == 16:
                freeze(model, "stem", find_classifier)
                options = {"clip_grad_norm": 0.5, "ema": 0.9}
            augmentation = Augmentation(AUGMENTATION, 8, (0.45,) * 3, (0.225,) * 3, torch.device("cpu"))
            trainer = tiny_trainer(
                run_folder,
                motion_root,
                plan,
                model=model,
                double=True,
                validate=batch == 8,
                log_every=1,
                augmentation=augmentation if batch == 8 else None,
                **options,
            )
            if resume_from:
                checkpoints = Checkpoints(folder / resume_from / str(batch) / "checkpoints")
                trainer.load(read_checkpoint(checkpoints.path(checkpoints.steps()[0])))
            trainer.train()
            trainer.logger.close()
            states = {"model": trainer.model.state_dict(), "evaluated": trainer.evaluated_model.state_dict()}
            torch.save(
                {f"{m}.{n}": v for m, state in states.items() for n, v in state.items()}, run_folder / f"rank{rank}.pt"
            )
        for batch in PRECISE_BN_BATCH_SIZES:
            options = {"micro_batch_clips": 16, "precise_bn_clips": 48}
            plan = tiny_plan("baseline", batch_size=batch)
            trainer = tiny_trainer(folder / "precise", motion_root, plan, double=True, **options)
            trainer.precise_bn()
            trainer.logger.close()
            torch.save(trainer.model.state_dict(), folder / f"precise_{batch}_{rank}_of_{world}.pt")


TWO_RANK_JOBS: list[Job] = [*(("two", batch, None) for batch in BATCH_SIZES), ("one_then_two", 8, "one")]
ONE_RANK_JOBS: list[Job] = [("two_then_one", 8, "two")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Path:
    """Train all runs, on one rank, on two, and on one again; return their folder."""
    port, folder = free_port(), tmp_path_factory.mktemp("runs")
    train(0, 1, port, folder, motion_root, [("one", batch, None) for batch in BATCH_SIZES])
    start_fork_server(PRELOADED_MODULES)
    mp.start_processes(train, (2, port, folder, motion_root, TWO_RANK_JOBS), nprocs=2, start_method="forkserver")
    train(0, 1, port, folder, motion_root, ONE_RANK_JOBS)
    return folder


@pytest.mark.slow
def test_two_ranks_train_like_one_also_from_a_checkpoint_on(runs: Path) -> None:
    for run, batch, resume_from in (*TWO_RANK_JOBS, *ONE_RANK_JOBS):
        expected, losses = metrics(runs / "one" / str(batch)), metrics(runs / run / str(batch))
        start = min(losses) - 1
        assert 5 <= start <= 10 if resume_from else start == 0
        assert losses == pytest.approx({step: expected[step] for step in range(start + 1, 21)}, rel=1e-8)
        one, two = (torch.load(runs / name / str(batch) / "rank0.pt") for name in ("one", run))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        if run != "two_then_one":
            other = torch.load(runs / run / str(batch) / "rank1.pt")
            assert all(torch.equal(value, two[name]) for name, value in other.items()), "ranks drifted apart"
    validation = metrics(runs / "one/8", "val_top1")
    assert len(validation) == 4
    assert metrics(runs / "two/8", "val_top1") == validation


def train_with_infinite_loss(rank: int, world: int, port: int, folder: Path, motion_root: str) -> None:
    """Train with an infinite loss, but finite gradients, in step 2 on rank 1."""
    with as_rank(rank, world, port):
        plan = tiny_plan("baseline")
        trainer = tiny_trainer(folder, motion_root, plan, checkpoint_every=1, log_every=4)
        loss, calls = trainer.train_step.task.loss, 0

        def infinite(logits: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(logits, labels) + (float("inf") if rank == 1 and calls == 3 else 0)

        trainer.train_step.task.loss = infinite  # type: ignore[method-assign]
        with pytest.raises(NonFiniteError) as error:
            trainer.train()
        trainer.logger.close()
        (folder / f"{rank}.txt").write_text(str(error.value))


def test_an_infinite_loss_on_one_rank_ends_all_ranks_before_a_checkpoint(tmp_path: Path, motion_root: str) -> None:
    start_fork_server(PRELOADED_MODULES)
    ranks = (2, free_port(), tmp_path, motion_root)
    mp.start_processes(train_with_infinite_loss, ranks, nprocs=2, start_method="forkserver")
    lines = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert lines[0] == lines[1]
    assert "not finite at step 2 " in lines[0]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1, 2]


@pytest.mark.parametrize("batch", PRECISE_BN_BATCH_SIZES)
def test_precise_bn_of_two_ranks_equals_that_of_one(runs: Path, batch: int) -> None:
    one, *two = (torch.load(runs / f"precise_{batch}_{rank}.pt") for rank in ("0_of_1", "0_of_2", "1_of_2"))
    names = [name for name in one if name.endswith(("running_mean", "running_var"))]
    assert len(names) > 8
    for name in names:
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], one[name], rtol=1e-9, atol=1e-12)
