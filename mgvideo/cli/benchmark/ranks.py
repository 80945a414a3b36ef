"""`mgvideo benchmark ranks`: simulate some ranks of a large run, one after the other on one machine.

Each trains through a long cycle in torch's fake process group, whose collective operations return at once. Everything
except the pixels is real: plan, sampler, loader, BN groups and their process groups, DDP, logging, precise BN,
validation and checkpoints. Ranks that disagree about the order of their collective operations hang on a real cluster;
here the first difference raises an error.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from mgvideo.cli import keys
from mgvideo.cli.benchmark import (
    ResultLog,
    measurement_conditions,
    open_report,
    plain_table,
    print_report,
    steps_replaced,
)
from mgvideo.cli.build import build_model, build_normalize, build_plan
from mgvideo.cli.schema import key
from mgvideo.engine.evaluation import Evaluator, Views
from mgvideo.engine.micro_batches import split_into_micro_batches
from mgvideo.engine.precision import choose_precision
from mgvideo.engine.tasks import TASKS, Task
from mgvideo.engine.train_step import TrainStep
from mgvideo.engine.trainer import Trainer, TrainOptions
from mgvideo.errors import UserError
from mgvideo.loading.loader import Batch, Loader, LoaderOptions
from mgvideo.loading.requests import ClipRequest, Sample
from mgvideo.plan.plan import Plan, require
from mgvideo.plan.shards import check_shards, shard_batch
from mgvideo.storage.checkpoints import Checkpoints
from mgvideo.tracking.run_logger import RunLogger

from .train import shorten_plan


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    world: int = key(128, "ranks of the run", least=2)
    ranks: list[int] = key([], "ranks to simulate; empty: the first and the last")
    videos: int = key(240_000, "videos in the dataset", least=1)
    visits: int = key(
        1, "steps of each slot of each phase of the first LR stage; each phase starts with one more", least=1
    )
    format: str = key("table", "table or json", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")


class Collective(NamedTuple):
    """A collective operation, or the creation of a process group, on one rank."""

    name: str
    ranks: int  # in its process group
    dtype: str
    values: int  # number of values that this rank sends; for `new_group`: the first rank of the group


class CollectiveLog(TorchDispatchMode):
    """Record the collective operations that this thread starts, including those of DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            names = [argument.name for argument in func._schema.arguments]
            group = dist.ProcessGroup.unbox(args[names.index("process_group")])
            sent = next((i for i, name in enumerate(names) if name.startswith("input")), 0)
            tensors = [args[sent]] if isinstance(args[sent], Tensor) else list(args[sent])
            values = sum(tensor.numel() for tensor in tensors)
            name = func._schema.name.removeprefix("c10d::").strip("_")
            self.collectives.append(Collective(name, group.size(), str(tensors[0].dtype), values))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class SlotCost:
    """Work of one rank in a step of a slot."""

    phase: int
    grid: str
    batch: int  # clips of all ranks
    clips: int  # of this rank
    bn_groups: int  # of this rank, which may hold a part of one
    bn_ranks: int  # that share a group
    micro_batches: int
    collectives: int
    sent_mb: float
    cpu_ms: float | None = None  # of the training thread, median over visits; None if not timed


@dataclass(frozen=True)
class SimulatedRank:
    """Slots and collective operations of one simulated rank."""

    rank: int
    slots: list[SlotCost]
    collectives: list[Collective]


class BlankVideos:
    """A dataset of black clips, which are expanded from one value and take no memory."""

    def __init__(self, videos: int, label: Tensor) -> None:
        self.videos, self.label = videos, label

    def __len__(self) -> int:
        return self.videos

    def __getitem__(self, request: ClipRequest) -> Sample:
        grid = request.grid
        clip = torch.zeros((1, 1, 1, 1), dtype=torch.uint8).expand(grid.frames, grid.size, grid.size, 3)
        return Sample(clip, self.label, request.index)


def expand_blank(samples: Sequence[Sample]) -> Batch:
    """Collate black clips without copying them."""
    clips = samples[0].clip.expand(len(samples), *samples[0].clip.shape)
    labels = torch.stack([sample.label for sample in samples])
    return Batch(clips, labels, torch.tensor([sample.index for sample in samples]))


@contextmanager
def simulated_rank(rank: int, world: int, log: CollectiveLog | None = None) -> Iterator[None]:
    """Run the block as one rank of a fake process group; `log` records its collective operations."""
    new_group = dist.new_group

    def new_fake_group(ranks: list[int] | None = None, **_: Any) -> Any:  # whatever the backend
        members = ranks or range(world)
        if log is not None:
            log.collectives.append(Collective("new_group", len(members), "", members[0]))
        return new_group(ranks)

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    replaced: Any = (dist, c10d)  # dist.new_subgroups calls c10d.new_group
    for module in replaced:
        module.new_group = new_fake_group
    try:
        with nullcontext() if log is None else log:
            yield
    finally:
        for module in replaced:
            module.new_group = new_group
        dist.destroy_process_group()


def first_difference(runs: Sequence[SimulatedRank]) -> str | None:
    """Describe the first collective operation that differs between ranks; None if all agree."""
    first, *others = runs
    for other in others:
        for i, (a, b) in enumerate(zip_longest(first.collectives, other.collectives)):
            # pickled objects (uint8) may differ in size, because gathering pads them
            if a is None or b is None or a[:3] != b[:3] or (a.values != b.values and a.dtype != "torch.uint8"):
                return f"rank {first.rank} and rank {other.rank} differ at collective operation {i}: {a} and {b}"
    return None


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(Keys, overrides)
    options.ranks = options.ranks or [0, options.world - 1]
    for rank in options.ranks:
        require(0 <= rank < options.world, f"ranks={options.ranks}: give ranks from 0 to {options.world - 1}")
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Simulate the ranks and print the report.

    Raises:
        UserError: ranks start different collective operations, which hang on a real cluster.
    """
    plan = long_cycle(build_plan(cfg, options.videos), options.visits)
    check_shards(plan, options.world)
    conditions = {
        **measurement_conditions(),
        "world": options.world,
        "videos": options.videos,
        "visits": options.visits,
    }
    with ResultLog(len(options.ranks) + 1, options.out) as log:
        runs = []
        for rank in options.ranks:
            runs.append(simulate(cfg, plan, rank, options.world))
            log(f"rank {rank}: {len(runs[-1].collectives)} collective operations in {plan.steps} steps")
        difference = first_difference(runs)
        if difference is None:
            times = step_times(cfg, plan, options.ranks[-1], options.world)
            slots = [replace(s, cpu_ms=t) for s, t in zip(runs[-1].slots, times, strict=True)]
            runs[-1] = replace(runs[-1], slots=slots)
            log(f"rank {options.ranks[-1]}: {sum(times) / len(times):.0f} CPU ms a step")
        write_report(options, runs, conditions)
    if difference is not None:
        raise UserError(difference)


def write_report(options: Keys, runs: Sequence[SimulatedRank], conditions: dict[str, Any]) -> None:
    """Write the report of all simulated ranks."""
    with open_report(options.out) as file:
        if options.format == "json":
            print(
                json.dumps({"conditions": conditions, "ranks": [asdict(rank_run) for rank_run in runs]}, indent=1),
                file=file,
            )
        else:
            print_report(file, conditions, [*map(rank_table, runs), totals_table(runs)])


def long_cycle(plan: Plan, visits: int) -> Plan:
    """Return the phases of the plan's first LR stage, with few steps each."""
    return shorten_plan(replace(plan, phases=tuple(phase for phase in plan.phases if phase.stage == 0)), visits)


def simulate(cfg: DictConfig, plan: Plan, rank: int, world: int) -> SimulatedRank:
    """Train one rank and record its collective operations."""
    log = CollectiveLog()
    bounds: dict[int, tuple[int, int]] = {}
    with simulated_rank(rank, world, log), simulated_trainer(cfg, plan) as trainer:
        train_step = trainer.train_step

        def recorded_step(step: int, batch: Batch) -> Tensor:
            start = len(log.collectives)
            loss = train_step(step, batch)
            bounds[step] = start, len(log.collectives)
            return loss

        with steps_replaced(trainer, recorded_step):
            trainer.train()
        limit = train_step.micro_batch_clips
    slots = []
    for p, phase in enumerate(plan.phases):
        for s, slot in enumerate(phase.slots):
            start, stop = bounds[phase.steps[1] - 1 - (phase.num_steps - 1 - s) % len(phase.slots)]
            shard = shard_batch(slot.batch, phase.bn_groups, rank, world)
            clips = max(1, limit * plan.base.num_frames * plan.base.crop_size**2 // slot.grid.volume)
            sent = sum(c.values * _bytes(c.dtype) for c in log.collectives[start:stop])
            slots.append(
                SlotCost(
                    p + 1, slot.grid.name, slot.batch, shard.stop - shard.start, shard.groups, len(shard.ranks),
                    len(split_into_micro_batches(shard, clips)), stop - start, sent / 1e6,
                )
            )  # fmt: skip
    return SimulatedRank(rank, slots, log.collectives)


def step_times(cfg: DictConfig, plan: Plan, rank: int, world: int) -> list[float]:
    """Return the median CPU milliseconds of a step of one rank, by slot, without recording collectives."""
    marks: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that the training thread does all the work
    try:
        with simulated_rank(rank, world), simulated_trainer(cfg, plan) as trainer:
            train_step = trainer.train_step

            def timed_step(step: int, batch: Batch) -> Tensor:
                start = time.thread_time()
                loss = train_step(step, batch)
                marks.append(1000 * (time.thread_time() - start))
                return loss

            with steps_replaced(trainer, timed_step):
                trainer.train()
    finally:
        torch.set_num_threads(threads)
    return [
        median(marks[i] for i in range(phase.steps[0] + 1, phase.steps[1]) if phase.slot(i) is slot)
        for phase in plan.phases
        for slot in phase.slots
    ]


@contextmanager
def simulated_trainer(cfg: DictConfig, plan: Plan) -> Iterator[Trainer]:
    """Yield the trainer of a run on black clips; it validates on two videos per rank."""
    precision = choose_precision(cfg.precision, torch.device("cpu"))
    model, task, normalize = build_model(cfg, precision), TASKS[cfg.dataset.task](), build_normalize(cfg, precision)
    classes = cfg.dataset.num_classes
    base = plan.base
    views = Views.of_size(base.num_frames, base.frame_stride, base.crop_size)
    evaluator = Evaluator(blank_loader(2 * dist.get_world_size(), task, classes), task, classes, normalize, precision)
    with tempfile.TemporaryDirectory() as folder:
        train_step = TrainStep(
            model,
            plan,
            task,
            instantiate(cfg.optimizer, model, lr=base.lr),
            seed=cfg.seed,
            normalize=normalize,
            precision=precision,
            micro_batch_clips=cfg.train.micro_batch_clips or 8,
        )
        trainer = Trainer(
            train_step,
            blank_loader(plan.dataset_size, task, classes),
            options=TrainOptions(
                log_every=cfg.train.log_every,
                evals_per_phase=cfg.train.evals_per_phase,
                precise_bn_clips=cfg.train.precise_bn_clips,
            ),
            logger=RunLogger(Path(folder), plan, active=False),
            checkpoints=Checkpoints(Path(folder) / "checkpoints", 1),
            validate=(evaluator, views) if cfg.train.evals_per_phase else None,
        )
        hook = lambda _, bucket: all_reduce_bucket(bucket)  # noqa: E731 (DDP takes no annotations as strings)
        trainer.train_step.wrapped_model.register_comm_hook(None, hook)  # type: ignore[operator]
        yield trainer


def blank_loader(videos: int, task: Task, classes: int) -> Loader:
    """Return a loader of black clips that works in this process."""
    return Loader(
        BlankVideos(videos, task.zero_labels(1, classes)[0]), LoaderOptions(num_workers=0), collate=expand_blank
    )


def all_reduce_bucket(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients as DDP does by default.

    DDP's own hook fails on the fake process group, whose futures have no value.
    """
    dist.all_reduce(bucket.buffer())
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer().div_(dist.get_world_size()))
    return future


def _bytes(dtype: str) -> int:
    return getattr(torch, dtype.removeprefix("torch.")).itemsize if dtype else 0


def rank_table(rank_run: SimulatedRank) -> Table:
    """Return a table with a row for each slot of each phase."""
    columns = (
        "slot",
        "clips",
        "of this rank",
        "BN groups",
        "ranks per group",
        "micro-batches",
        "collectives",
        "MB",
        "CPU ms",
    )
    report = plain_table(f"rank {rank_run.rank}: one step of each slot", *columns)
    for s in rank_run.slots:
        cpu = "–" if s.cpu_ms is None else f"{s.cpu_ms:.0f}"
        report.add_row(
            f"{s.phase}. {s.grid}", f"{s.batch:,}", f"{s.clips}", f"{s.bn_groups}", f"{s.bn_ranks}",
            f"{s.micro_batches}", f"{s.collectives}", f"{s.sent_mb:.1f}", cpu,
        )  # fmt: skip
    return report


def totals_table(runs: Sequence[SimulatedRank]) -> Table:
    """Return a table of the number of collective operations of each rank, by name."""
    names = sorted({c.name for rank_run in runs for c in rank_run.collectives})
    report = plain_table("all collectives", "rank", *names, "same order")
    for rank_run in runs:
        counts = [sum(c.name == name for c in rank_run.collectives) for name in names]
        same = first_difference([runs[0], rank_run]) is None
        report.add_row(f"{rank_run.rank}", *map(str, counts), "yes" if same else "NO")
    return report
