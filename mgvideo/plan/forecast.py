"""What a plan asks of the hardware: each GPU's share, the cost, the data rate and, from measurements, the time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mgvideo.errors import UserError

from .plan import Grid, Phase, Plan, Slot, finite_or_nan, require
from .shards import shard_batch

ClipCost = Callable[[Grid], float]


def clip_pixels(grid: Grid) -> float:
    """The cost of a clip where nothing is known of the model: its pixels."""
    return grid.volume


def total_cost(phases: Iterable[Phase], clip_cost: ClipCost = clip_pixels) -> float:
    """What the training steps of phases cost, in units of `clip_cost`."""
    return sum(
        visits * slot.batch * clip_cost(slot.grid)
        for phase in phases
        for visits, slot in zip(phase.steps_per_slot(), phase.slots, strict=True)
    )


def clips_per_gpu(phase: Phase, slot: Slot, gpus: int) -> tuple[int, int]:
    """The fewest and the most clips of a slot's step that a GPU takes. Raises UserError as `shard_batch`."""
    shards = [shard_batch(slot.batch, phase.bn_groups, rank, gpus) for rank in range(gpus)]
    sizes = [shard.stop - shard.start for shard in shards]
    return min(sizes), max(sizes)


def bn_layout(phase: Phase, gpus: int) -> tuple[str, int]:
    """How BN groups lie on GPUs: ("sub", groups on each GPU), ("sync", GPUs to a group) or ("plain", 1).

    Where groups do not divide among GPUs, the most on one.
    """
    shard = shard_batch(phase.batch, phase.bn_groups, gpus - 1, gpus)
    if len(shard.ranks) > 1:
        return "sync", len(shard.ranks)
    groups = -(-phase.bn_groups // gpus)
    return ("sub", groups) if groups > 1 else ("plain", 1)


@dataclass(frozen=True)
class Benchmark:
    """Measurements by which to predict a run: a JSON file of tables by grid, each like `{"8x112": 0.31}`.

    `step_seconds`: one training step on one GPU, of `step_clips` clips. Without `step_clips` it is a step of that GPU's
    share of the plan's batch; with it, other clips are taken to take time in proportion. `clips_per_second`: what the
    loader of one GPU delivers with `workers` worker processes; may be left out, then nothing is said of waiting.
    """

    step_seconds: dict[str, float]
    clips_per_second: dict[str, float] = field(default_factory=dict)
    step_clips: dict[str, int] = field(default_factory=dict)
    workers: int | None = None
    source: str = "the benchmark"

    def __post_init__(self) -> None:
        for key in ("step_seconds", "clips_per_second", "step_clips"):
            table = getattr(self, key)
            valid = isinstance(table, dict) and all(finite_or_nan(value) > 0 for value in table.values())
            require(valid, f'{self.source}: {key} is no table of numbers above 0 by grid, like {{"8x112": 0.31}}')
        valid = self.workers is None or (isinstance(self.workers, int) and self.workers >= 1)
        require(valid, f"{self.source}: workers={self.workers}, give a whole number from 1 up")

    def step_time_s(self, grid: Grid, clips: int) -> float:
        """Seconds of a step in which a GPU runs `clips` clips."""
        return self._of("step_seconds", grid) * clips / self.step_clips.get(grid.name, clips)

    def loading_time_s(self, grid: Grid, clips: int) -> float:
        """Seconds in which a GPU's loader delivers `clips` clips; 0 where nothing was measured."""
        return clips / self._of("clips_per_second", grid) if self.clips_per_second else 0.0

    def _of(self, key: str, grid: Grid) -> float:
        table: dict[str, float] = getattr(self, key)
        has = ", ".join(table) or "none"
        require(grid.name in table, f"{self.source}: {key} has no grid {grid.name} (it has {has}): measure it too")
        return table[grid.name]


def read_benchmark(path: str | Path) -> Benchmark:
    """Reads a benchmark file, see Benchmark. Raises UserError where it cannot be read or holds something else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"benchmark={path}: not a JSON file that can be read ({error})") from error
    require(isinstance(data, dict) and "step_seconds" in data, f"benchmark={path}: no table of step_seconds by grid")
    keys = ("step_seconds", "clips_per_second", "step_clips", "workers")
    return Benchmark(**{key: data[key] for key in keys if key in data}, source=f"benchmark={path}")


@dataclass(frozen=True)
class PhaseTime:
    """The predicted time of a phase. Loading runs beside computing, so the slower of the two sets the pace."""

    compute_s: float  # seconds
    loading_s: float  # seconds; 0 where the loader's rate is not known

    @property
    def seconds(self) -> float:
        """Wall-clock."""
        return max(self.compute_s, self.loading_s)

    @property
    def wait_fraction(self) -> float:
        """The share of the time that GPUs wait for data."""
        return 1 - self.compute_s / self.seconds


def predict_phase_times(plan: Plan, gpus: int, benchmark: Benchmark) -> list[PhaseTime]:
    """The time of each phase, by its busiest GPU. Raises UserError where the benchmark lacks a grid of the plan."""
    times = []
    for phase in plan.phases:
        runs = [
            (n, slot, clips_per_gpu(phase, slot, gpus)[1])
            for n, slot in zip(phase.steps_per_slot(), phase.slots, strict=True)
        ]
        compute = sum(n * benchmark.step_time_s(slot.grid, clips) for n, slot, clips in runs)
        times.append(PhaseTime(compute, sum(n * benchmark.loading_time_s(slot.grid, clips) for n, slot, clips in runs)))
    return times


def group_phases_by_slots(plan: Plan) -> list[list[int]]:
    """The indices of phases that share all their slots, in the order in which they first come."""
    groups: dict[tuple[Slot, ...], list[int]] = {}
    for i, phase in enumerate(plan.phases):
        groups.setdefault(phase.slots, []).append(i)
    return list(groups.values())


def suggest_loader_changes(plan: Plan, times: list[PhaseTime], workers: int | None) -> Iterator[str]:
    """One line for each grid whose phases wait for data over 2 % of their time: how long, and what would help."""
    for indices in group_phases_by_slots(plan):
        phase, time = plan.phases[indices[0]], times[indices[0]]
        if time.wait_fraction <= 0.02:
            continue
        factor = time.loading_s / time.compute_s
        more = f"{factor:.1f}× as many workers a GPU"
        if workers:
            more += f" ({math.ceil(workers * factor)} instead of {workers})"
        coarse = min(slot.grid.size for slot in phase.slots) < plan.base.crop_size
        pyramid = ", or a pyramid: these clips are smaller than the recipe's" if coarse else ""
        listed = ", ".join(str(i + 1) for i in indices)
        yield f"phase {listed} ({phase.grid.name}) waits {time.wait_fraction:.0%} of its time for data: {more}{pyramid}"
