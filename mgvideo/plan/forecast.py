"""What a plan requires of the hardware: clips per GPU, cost, data rate and, from a benchmark, the training time."""

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
    """Return the pixels of a clip: its cost when no model is given."""
    return grid.volume


def total_cost(phases: Iterable[Phase], clip_cost: ClipCost = clip_pixels) -> float:
    """Return the cost of all training steps of `phases`, in units of `clip_cost`."""
    return sum(
        steps * slot.batch * clip_cost(slot.grid)
        for phase in phases
        for steps, slot in zip(phase.steps_per_slot(), phase.slots, strict=True)
    )


def clips_per_gpu(phase: Phase, slot: Slot, gpus: int) -> tuple[int, int]:
    """Return the smallest and the largest number of clips that a GPU has in a step of `slot`.

    Raises:
        UserError: the batch cannot be split evenly over the GPUs, see `shard_batch`.
    """
    shards = [shard_batch(slot.batch, phase.bn_groups, rank, gpus) for rank in range(gpus)]
    sizes = [shard.stop - shard.start for shard in shards]
    return min(sizes), max(sizes)


def bn_layout(phase: Phase, gpus: int) -> tuple[str, int]:
    """Return how BN groups are distributed over GPUs: ("sub", groups per GPU), ("sync", GPUs per group), ("plain", 1).

    If some GPUs have one group more than others, the larger number is returned.
    """
    shard = shard_batch(phase.batch, phase.bn_groups, gpus - 1, gpus)
    if len(shard.ranks) > 1:
        return "sync", len(shard.ranks)
    groups = -(-phase.bn_groups // gpus)
    return ("sub", groups) if groups > 1 else ("plain", 1)


@dataclass(frozen=True)
class Benchmark:
    """Measurements from which to predict the time of a run: the contents of a JSON file.

    `step_seconds`, `clips_per_second` and `step_clips` are tables by grid, such as `{"8x112": 0.31}`.

    Args:
        step_seconds: time of one training step on one GPU.
        clips_per_second: rate of one GPU's loader with `workers` worker processes. Without it no wait for data is
            predicted.
        step_clips: clips in the measured step. The time of other numbers of clips is taken to be proportional. Without
            it the measured step is a step with that GPU's part of the plan's batch.
        workers: worker processes per GPU in the measurement.
        source: name of the benchmark in error messages.
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
            require(valid, f'{self.source}: {key} must map grids to numbers above 0, such as {{"8x112": 0.31}}')
        valid = self.workers is None or (isinstance(self.workers, int) and self.workers >= 1)
        require(valid, f"{self.source}: workers={self.workers}, give a whole number from 1 up")

    def step_time_s(self, grid: Grid, clips: int) -> float:
        """Return the seconds of a step with `clips` clips on one GPU."""
        return self._lookup("step_seconds", grid) * clips / self.step_clips.get(grid.name, clips)

    def loading_time_s(self, grid: Grid, clips: int) -> float:
        """Return the seconds that one GPU's loader takes for `clips` clips, or 0 if its rate was not measured."""
        return clips / self._lookup("clips_per_second", grid) if self.clips_per_second else 0.0

    def _lookup(self, key: str, grid: Grid) -> float:
        table: dict[str, float] = getattr(self, key)
        measured = ", ".join(table) or "none"
        require(grid.name in table, f"{self.source}: {key} has no grid {grid.name} (it has {measured}): measure it too")
        return table[grid.name]


def read_benchmark(path: str | Path) -> Benchmark:
    """Read a benchmark file, see Benchmark.

    Raises:
        UserError: the file cannot be read, is not JSON, or is not a valid benchmark.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"benchmark={path}: cannot be read as JSON ({error}): give a benchmark file") from error
    has_steps = isinstance(data, dict) and "step_seconds" in data
    require(has_steps, f"benchmark={path}: has no step_seconds: add seconds per step by grid")
    keys = ("step_seconds", "clips_per_second", "step_clips", "workers")
    return Benchmark(**{key: data[key] for key in keys if key in data}, source=f"benchmark={path}")


@dataclass(frozen=True)
class PhaseTime:
    """The predicted time of a phase. Loading and computing overlap, so the slower of the two sets the pace."""

    compute_s: float
    loading_s: float  # 0 if the loader's rate is unknown

    @property
    def seconds(self) -> float:
        """Wall-clock time of the phase."""
        return max(self.compute_s, self.loading_s)

    @property
    def wait_fraction(self) -> float:
        """Fraction of the time that GPUs wait for data."""
        return 1 - self.compute_s / self.seconds


def predict_phase_times(plan: Plan, gpus: int, benchmark: Benchmark) -> list[PhaseTime]:
    """Predict the time of each phase on its busiest GPU.

    Raises:
        UserError: the benchmark lacks a grid of the plan.
    """
    times = []
    for phase in plan.phases:
        slots = [
            (steps, slot.grid, clips_per_gpu(phase, slot, gpus)[1])
            for steps, slot in zip(phase.steps_per_slot(), phase.slots, strict=True)
        ]
        compute_s = sum(steps * benchmark.step_time_s(grid, clips) for steps, grid, clips in slots)
        loading_s = sum(steps * benchmark.loading_time_s(grid, clips) for steps, grid, clips in slots)
        times.append(PhaseTime(compute_s, loading_s))
    return times


def group_phases_by_slots(plan: Plan) -> list[list[int]]:
    """Return lists of indices of phases with equal slots, in order of first occurrence."""
    groups: dict[tuple[Slot, ...], list[int]] = {}
    for i, phase in enumerate(plan.phases):
        groups.setdefault(phase.slots, []).append(i)
    return list(groups.values())


def suggest_loader_changes(plan: Plan, times: list[PhaseTime], workers: int | None) -> Iterator[str]:
    """Yield a line for each grid whose phases wait for data more than 2 % of their time: how long, and what to change.

    Args:
        plan: the plan.
        times: the predicted time of each phase.
        workers: loader workers per GPU that the prediction assumes, if known.
    """
    for indices in group_phases_by_slots(plan):
        phase, time = plan.phases[indices[0]], times[indices[0]]
        if time.wait_fraction <= 0.02:
            continue
        slowdown = time.loading_s / time.compute_s
        remedy = f"use {slowdown:.1f}× as many workers per GPU"
        if workers:
            remedy += f" ({math.ceil(workers * slowdown)} instead of {workers})"
        if min(slot.grid.size for slot in phase.slots) < plan.base.crop_size:
            remedy += ", or a pyramid (some clips have smaller crops than base.crop_size)"
        numbers = ", ".join(str(i + 1) for i in indices)
        yield f"phase {numbers} ({phase.grid.name}) waits {time.wait_fraction:.0%} of its time for data: {remedy}"
