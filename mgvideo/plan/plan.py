"""The plan of a run: clip shape, batch size, BN groups and learning rate of every step, computed before training.

Pure data and arithmetic without torch. `mgvideo.plan.schedules` makes plans; the rest of the project reads them.
"""

from __future__ import annotations

import math
import sys
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from hashlib import shake_256
from itertools import accumulate, pairwise
from typing import Any

from mgvideo.errors import UserError

LR_POLICIES = ("step", "cosine", "wsd")
WARMUP_BY = ("epochs", "steps")


@dataclass(frozen=True)
class Base:
    """The baseline recipe, `base.*` of a config. The multigrid factors multiply its batch, frames, crop and LR.

    Raises:
        UserError: a value is invalid. The message names the key to change.
    """

    batch_size: int  # clips per step, over all GPUs
    num_frames: int  # frames per clip
    crop_size: int  # side of the square crop, pixels
    frame_stride: int  # temporal stride between frames
    short_side: tuple[int, int]  # range of the short side before cropping, pixels, both ends included
    epochs: float
    lr: float
    lr_milestones: tuple[float, ...]  # epochs at which the LR drops and a new LR stage starts
    gamma: float  # LR factor from one stage to the next
    warmup_epochs: float
    warmup_lr: float  # LR at the start of the warm-up
    lr_policy: str = "step"  # or "cosine" or "wsd", see Plan.lr_at
    final_lr: float = 0.0  # LR at the end of a cosine
    cosine_after_warmup: bool = False  # the cosine starts after the warm-up; False: at epoch 0
    warmup_by: str | None = None  # "epochs" or "steps", see Plan.warmup_end; None: as the schedule chooses, or "epochs"
    # Pairs (name of a grid, batch multiplier) that replace the multipliers computed from volumes; empty: none.
    batch_multipliers: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "short_side", tuple(self.short_side))
        object.__setattr__(self, "lr_milestones", tuple(self.lr_milestones))
        object.__setattr__(self, "batch_multipliers", tuple((name, count) for name, count in self.batch_multipliers))
        for key in ("batch_size", "num_frames", "crop_size", "frame_stride"):
            value = getattr(self, key)
            require(isinstance(value, int) and value >= 1, f"base.{key}={value}: give a whole number from 1 up")
        for key in ("epochs", "lr", "gamma"):
            require(finite_or_nan(getattr(self, key)) > 0, f"base.{key}={getattr(self, key)}: give a number above 0")
        for key in ("warmup_epochs", "warmup_lr", "final_lr"):
            require(finite_or_nan(getattr(self, key)) >= 0, f"base.{key}={getattr(self, key)}: give a number from 0 up")
        self._check_short_side()
        self._check_lr_milestones()
        message = f"base.warmup_epochs={self.warmup_epochs} is longer than base.epochs={self.epochs}: lower it"
        longest = self.epochs if not self.cosine_after_warmup else math.nextafter(self.epochs, 0)
        require(self.warmup_epochs <= longest, message)
        require(self.final_lr <= self.lr, f"base.final_lr={self.final_lr} is above base.lr={self.lr}: lower it")
        unknown = f"base.lr_policy={self.lr_policy}: choose one of {', '.join(LR_POLICIES)}"
        require(self.lr_policy in LR_POLICIES, unknown)
        unknown = f"base.warmup_by={self.warmup_by}: choose one of {', '.join(WARMUP_BY)}"
        require(self.warmup_by in (None, *WARMUP_BY), unknown)
        no_decay = (
            "base.lr_policy=wsd: give base.lr_milestones, the last of which is the epoch where the LR decay starts"
        )
        require(self.lr_policy != "wsd" or bool(self.lr_milestones), no_decay)

    def _check_short_side(self) -> None:
        setting = f"base.short_side={list(self.short_side)}"
        integers = all(isinstance(side, int) for side in self.short_side)
        require(integers and len(self.short_side) == 2, f"{setting}: give two whole numbers, [shortest, longest]")
        low, high = self.short_side
        require(low <= high, f"{setting}: the shortest side goes first, did you mean [{high}, {low}]?")
        too_small = f"{setting}: smaller than the {self.crop_size}-pixel crop; raise it or lower base.crop_size"
        require(low >= self.crop_size, too_small)

    def _check_lr_milestones(self) -> None:
        milestones = self.lr_milestones
        setting = f"base.lr_milestones={list(milestones)}"
        require(all(finite_or_nan(epoch) > 0 for epoch in milestones), f"{setting}: give epochs, numbers above 0")
        increasing = all(a < b for a, b in pairwise(milestones))
        require(increasing, f"{setting}: the epochs must increase from one milestone to the next")
        too_late = f"{setting}: the last milestone must be below base.epochs={self.epochs}; lower it or train longer"
        require(not milestones or milestones[-1] < self.epochs, too_late)

    @property
    def lr_bounds(self) -> tuple[float, ...]:
        """Epochs at which the LR stages start, then the epoch at which the last stage ends."""
        return (0, *self.lr_milestones, self.epochs)


@dataclass(frozen=True)
class Grid:
    """How a clip is sampled: `frames` frames of a `size` × `size` crop."""

    frames: int
    size: int
    strides: tuple[int, int]  # range of the temporal stride, drawn uniformly from its integers, both ends included
    scales: tuple[int, int]  # range of the short side before cropping, pixels, both ends included

    @property
    def volume(self) -> int:
        """Pixels of one clip, over all frames."""
        return self.frames * self.size**2

    @property
    def name(self) -> str:
        """Frames and crop size, such as `8x112`. Benchmark files use it as the key of times and rates."""
        return f"{self.frames}x{self.size}"


@dataclass(frozen=True)
class Slot:
    """One grid with its global batch size."""

    grid: Grid
    batch: int  # clips over all GPUs
    strength: float = 1.0  # of augmentation and drop path, as a fraction of their full strength


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one long-cycle grid, one LR factor and one BN grouping."""

    stage: int  # LR stage, from 0
    grid: Grid  # the long-cycle grid, the largest grid of the slots
    multiplier: int  # batch multiplier of `grid` relative to the base's grid
    slots: tuple[Slot, ...]  # successive steps cycle through these, or draw one of them; the last one has `grid`
    lr_factor: float  # multiplies the base LR
    bn_groups: int  # number of BN groups that the global batch of every slot is split into
    epochs: tuple[float, float]  # start, end
    steps: tuple[int, int]  # first step, one past the last
    weights: tuple[float, ...] = ()  # each step draws its slot with these weights; empty: steps cycle through the slots
    draw_seed: int = 0  # seed of these draws
    trains: str = "all"  # weights that are trained: all, or head (with the norms)
    index: int = field(default=0, kw_only=True)  # place among the plan's phases, from 0; `Plan` sets it

    @property
    def num_steps(self) -> int:
        """Number of steps in this phase."""
        return self.steps[1] - self.steps[0]

    @property
    def batch(self) -> int:
        """Global batch size of the long-cycle grid."""
        return self.slots[-1].batch

    def slot(self, step: int) -> Slot:
        """Return the slot of a step of this phase. Steps are counted from the start of the run."""
        position = step - self.steps[0]
        return self.slots[self._drawn_slots()[position] if self.weights else position % len(self.slots)]

    def steps_per_slot(self, steps: int | None = None) -> tuple[int, ...]:
        """Return how many of the phase's first `steps` steps (default: all) run each slot."""
        count = self.num_steps if steps is None else steps
        if self.weights:
            drawn = self._drawn_slots()
            return tuple(drawn.count(i, 0, count) for i in range(len(self.slots)))
        return tuple(-((i - count) // len(self.slots)) for i in range(len(self.slots)))

    def clips(self, steps: int | None = None) -> int:
        """Return how many clips the phase's first `steps` steps (default: all) train on."""
        return sum(n * slot.batch for n, slot in zip(self.steps_per_slot(steps), self.slots, strict=True))

    def _drawn_slots(self) -> bytes:
        """Return the index of the slot of each step of a phase with weights."""
        return draw_slots(self.weights, self.draw_seed, self.steps[0], self.num_steps)


@lru_cache(maxsize=64)
def draw_slots(weights: tuple[float, ...], seed: int, first_step: int, count: int) -> bytes:
    """Return `count` indices of slots, drawn with `weights`: a pure function of its arguments.

    Each step takes 16 bits of the SHAKE-256 hash of the seed and the first step, so weights are rounded to 1/65536.
    """
    words = array("H", shake_256(f"{seed} {first_step}".encode()).digest(2 * count))
    if sys.byteorder == "big":
        words.byteswap()
    return bytes(map(_slot_of_word(weights).__getitem__, words))


@lru_cache(maxsize=16)
def _slot_of_word(weights: tuple[float, ...]) -> bytes:
    """Return the index of the slot that each of the 65,536 words stands for."""
    bounds = list(accumulate(weights))
    return bytes(bisect_right(bounds, (word + 0.5) / 2**16 * bounds[-1]) for word in range(2**16))


@dataclass(frozen=True)
class Plan:
    """A whole run: consecutive phases without gaps, each at least one step long.

    Within a phase the epoch grows linearly with the step, from the phase's first epoch to its last. So phase
    boundaries fall exactly on the epochs of the schedule for any dataset size.
    """

    base: Base
    schedule: str  # name of the schedule, such as baseline or multigrid
    dataset_size: int  # clips of an epoch: the training videos, times the clips that are read of each
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()  # warnings to print before the run starts, one line each

    def __post_init__(self) -> None:
        phases = tuple(replace(phase, index=index) for index, phase in enumerate(self.phases))
        object.__setattr__(self, "phases", phases)

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        return self.phases[-1].steps[1]

    @property
    def epochs(self) -> float:
        """Number of epochs of the whole run."""
        return self.phases[-1].epochs[1]

    def phase(self, step: float) -> Phase:
        """Return the phase of a step, or of a fraction of one.

        Raises:
            IndexError: the step is outside the plan.
        """
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside a plan of {self.steps} steps")
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.steps[0]) - 1]

    def slot(self, step: int) -> Slot:
        """Return the grid and the global batch size of a step."""
        return self.phase(step).slot(step)

    def describe(self, step: int) -> str:
        """Return a step with its phase, counted from 1, and its grid, for messages: `step 3 (phase 1, 8×32²)`."""
        phase = self.phase(step)
        grid = phase.slot(step).grid
        return f"step {step} (phase {phase.index + 1}, {grid.frames}×{grid.size}²)"

    def epoch(self, step: float) -> float:
        """Return the epoch at the start of a step or at a fraction of it. For `self.steps` it is the end of the run."""
        if step == self.steps:
            return self.epochs
        phase = self.phase(step)
        start, end = phase.epochs
        return start + (end - start) * ((step - phase.steps[0]) / phase.num_steps)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.lr_at(self.epoch(step))

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at an epoch.

        Up to `warmup_end` it rises linearly from `warmup_lr` to the scheduled LR there; with `warmup_by` "steps" to the
        LR that this is on the grid of the epoch. After that it is the base LR times the phase's `lr_factor`, which
        includes the decay at milestones (policy "step").

        With the policy "cosine", `lr_factor` includes no decay. The LR is also multiplied by a half cosine over the
        baseline's epochs, evaluated at the equivalent baseline epoch: a run that is 30 % through the steps of LR stage
        k uses the cosine at 30 % of the baseline's stage k. So `lr_milestones` bound the long cycles under both
        policies, the baseline follows the usual cosine, and every schedule reaches `final_lr` at the end of the run.
        With `cosine_after_warmup` it is a half cosine over the baseline's epochs after the warm-up.

        With "wsd" (warm-up, stable, decay; Hu et al., arXiv 2404.06395) `lr_factor` includes no decay either. The LR is
        constant up to the last of `lr_milestones`, as an equivalent baseline epoch, and then falls linearly to 0.

        In a finish (a phase after the last LR stage) the LR falls linearly to 0, under all policies.
        """
        base, end = self.base, self.warmup_end
        if epoch >= end:
            return self._scheduled_lr(epoch)
        lr, done, whole = self._scheduled_lr(end), epoch, end
        if base.warmup_by == "steps":
            phase = self._phase_at(epoch)
            lr *= phase.lr_factor / self._phase_at(end).lr_factor
            done, whole = self._baseline_epoch(phase, epoch), base.warmup_epochs
        return base.warmup_lr + (lr - base.warmup_lr) * done / whole

    @cached_property
    def warmup_end(self) -> float:
        """The epoch at which the warm-up ends.

        With `warmup_by` "epochs" it is `warmup_epochs`, as in the paper. With "steps" it is the equivalent of that
        epoch in this run: where the baseline warms up over 15 % of its steps, so does every schedule, whatever its
        batches and epochs.
        """
        warmup = self.base.warmup_epochs
        if self.base.warmup_by != "steps" or not warmup:
            return warmup
        bounds = self.base.lr_bounds
        stage = bisect_left(bounds, warmup, lo=1) - 1
        first, last = self._stage_steps(stage)
        return self.epoch(first + (last - first) * (warmup - bounds[stage]) / (bounds[stage + 1] - bounds[stage]))

    def _scheduled_lr(self, epoch: float) -> float:
        phase = self._phase_at(epoch)
        base, lr = self.base, self.base.lr * phase.lr_factor
        start, end = phase.epochs
        if phase.stage >= len(base.lr_bounds) - 1:  # a finish
            return lr * (end - min(epoch, end)) / (end - start)
        if base.lr_policy == "step":
            return lr
        progress = self._baseline_epoch(phase, epoch)
        if base.lr_policy == "wsd":
            return lr * min(1.0, (base.epochs - progress) / (base.epochs - base.lr_milestones[-1]))
        skipped = base.warmup_epochs if base.cosine_after_warmup else 0.0
        cosine = (1 + math.cos(math.pi * max(0.0, progress - skipped) / (base.epochs - skipped))) / 2
        return base.final_lr + (lr - base.final_lr) * cosine

    def _phase_at(self, epoch: float) -> Phase:
        return self.phases[max(0, bisect_right(self.phases, epoch, key=lambda phase: phase.epochs[0]) - 1)]

    def _baseline_epoch(self, phase: Phase, epoch: float) -> float:
        """Return the equivalent baseline epoch: as far through its LR stage as this run is at `epoch`."""
        stage_start, stage_end = self._stage_steps(phase.stage)
        start, end = phase.epochs
        step = phase.steps[0] + phase.num_steps * (min(epoch, end) - start) / (end - start)
        baseline_start, baseline_end = self.base.lr_bounds[phase.stage : phase.stage + 2]
        return baseline_start + (baseline_end - baseline_start) * (step - stage_start) / (stage_end - stage_start)

    def _stage_steps(self, stage: int) -> tuple[int, int]:
        """Return the first step of an LR stage and the step after its last: equal if all its phases were dropped."""
        first = bisect_left(self.phases, stage, key=lambda phase: phase.stage)
        after = bisect_right(self.phases, stage, key=lambda phase: phase.stage)
        start = self.phases[first].steps[0] if first < len(self.phases) else self.steps
        return start, self.phases[after - 1].steps[1] if after > first else start

    def clips_before(self, step: int) -> int:
        """Return how many clips all steps before `step` train on."""
        steps_done = [(phase, min(step, phase.steps[1]) - phase.steps[0]) for phase in self.phases]
        return sum(phase.clips(steps) for phase, steps in steps_done if steps > 0)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for `json.dump`. `Plan.from_json` converts it back to an equal plan.

        Fields that only some plans use are left out where they have their default.
        """
        data = asdict(self)
        _drop_defaults(data["base"], batch_multipliers=(), final_lr=0.0, cosine_after_warmup=False, warmup_by=None)
        for phase in data["phases"]:
            del phase["index"]
            _drop_defaults(phase, weights=(), draw_seed=0, trains="all")
            for slot in phase["slots"]:
                _drop_defaults(slot, strength=1.0)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Return the plan that `to_json` converted.

        Raises:
            UserError: keys are missing or unknown.
        """
        try:
            phases = tuple(_phase_from(phase) for phase in data["phases"])
            return cls(**{**_tuples(data), "base": Base(**data["base"]), "phases": phases})
        except (KeyError, TypeError) as error:
            raise UserError(f"not a plan of this version of mgvideo ({error}): make the plan again") from error


def require(ok: bool, message: str) -> None:
    """Raise UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


def finite_or_nan(value: object) -> float:
    """Return `value` if it is a finite number, else NaN, which makes every comparison false."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _drop_defaults(data: dict[str, Any], **defaults: Any) -> None:
    for key, default in defaults.items():
        if data[key] == default:
            del data[key]


def _phase_from(data: dict[str, Any]) -> Phase:
    slots = tuple(Slot(**{**slot, "grid": _grid_from(slot["grid"])}) for slot in data["slots"])
    return Phase(**{**_tuples(data), "grid": _grid_from(data["grid"]), "slots": slots})


def _grid_from(data: dict[str, Any]) -> Grid:
    return Grid(**_tuples(data))


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` with its lists as tuples, because JSON stores tuples as lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
