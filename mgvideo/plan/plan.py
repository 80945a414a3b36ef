"""The plan of a run: what is trained on at every step, at which learning rate, known before training starts.

Pure data and arithmetic, no torch. `mgvideo.plan.schedules` makes plans; everything else asks them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from mgvideo.errors import UserError


@dataclass(frozen=True)
class Base:
    """The baseline recipe, which the multigrid factors multiply: `base.*` of a config.

    Raises UserError, naming the key to change, where the values make no sense.
    """

    batch_size: int  # clips per step, over all GPUs
    num_frames: int
    crop_size: int  # crop in pixels
    frame_stride: int  # between frames
    short_side: tuple[int, int]  # short side in pixels before cropping, both ends included
    epochs: float
    lr: float
    lr_milestones: tuple[float, ...]  # epochs at which the LR drops and a new LR stage starts
    gamma: float  # LR factor from one stage to the next
    warmup_epochs: float
    warmup_lr: float  # where the warm-up starts
    lr_policy: str = "step"  # or "cosine", see Plan.lr_at

    def __post_init__(self) -> None:
        object.__setattr__(self, "short_side", tuple(self.short_side))
        object.__setattr__(self, "lr_milestones", tuple(self.lr_milestones))
        for key in ("batch_size", "num_frames", "crop_size", "frame_stride"):
            whole = isinstance(getattr(self, key), int)
            require(
                whole and getattr(self, key) >= 1, f"base.{key}={getattr(self, key)}: give a whole number from 1 up"
            )
        for key in ("epochs", "lr", "gamma"):
            require(finite_or_nan(getattr(self, key)) > 0, f"base.{key}={getattr(self, key)}: give a number above 0")
        for key in ("warmup_epochs", "warmup_lr"):
            require(finite_or_nan(getattr(self, key)) >= 0, f"base.{key}={getattr(self, key)}: give a number from 0 up")
        self._check_short_side()
        self._check_lr_milestones()
        warmup = f"base.warmup_epochs={self.warmup_epochs} is longer than base.epochs={self.epochs}: lower it"
        require(self.warmup_epochs <= self.epochs, warmup)
        policies = ("step", "cosine")
        require(self.lr_policy in policies, f"base.lr_policy={self.lr_policy}: choose one of {', '.join(policies)}")

    def _check_short_side(self) -> None:
        given = f"base.short_side={list(self.short_side)}"
        whole = all(isinstance(side, int) for side in self.short_side)
        require(whole and len(self.short_side) == 2, f"{given}: give two whole numbers, [shortest, longest] short side")
        low, high = self.short_side
        require(low <= high, f"{given}: the shortest side comes first, did you mean [{high}, {low}]?")
        require(
            low >= self.crop_size, f"{given}: no {self.crop_size}-pixel crop fits; raise it, or lower base.crop_size"
        )

    def _check_lr_milestones(self) -> None:
        steps = self.lr_milestones
        given = f"base.lr_milestones={list(steps)}"
        require(all(finite_or_nan(step) > 0 for step in steps), f"{given}: give epochs, numbers above 0")
        rising = all(a < b for a, b in pairwise(steps))
        require(rising, f"{given}: epochs must increase from one LR stage to the next")
        ended = f"{given}: the last stage starts after base.epochs={self.epochs} has ended"
        require(not steps or steps[-1] < self.epochs, ended)

    @property
    def lr_bounds(self) -> tuple[float, ...]:
        """Epochs at which LR stages start, and the epoch at which the last one ends."""
        return (0, *self.lr_milestones, self.epochs)


@dataclass(frozen=True)
class Grid:
    """How a clip is sampled: `frames` frames of a `size` × `size` crop."""

    frames: int
    size: int
    strides: tuple[int, int]  # temporal stride, drawn uniformly from these integers, both ends included
    scales: tuple[int, int]  # short side in pixels before cropping, both ends included

    @property
    def volume(self) -> int:
        """Pixels of one clip."""
        return self.frames * self.size**2

    @property
    def name(self) -> str:
        """Frames and size as in `8x112`: the key of measured times and rates."""
        return f"{self.frames}x{self.size}"


@dataclass(frozen=True)
class Slot:
    """One grid with its global batch size."""

    grid: Grid
    batch: int


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one long-cycle grid, one LR factor and one BN grouping."""

    stage: int  # LR stage, from 0
    grid: Grid  # the long-cycle grid: of all slots the largest
    multiplier: int  # batch multiplier of `grid` against the base
    slots: tuple[Slot, ...]  # steps go round these
    lr_factor: float  # times base LR
    bn_groups: int  # groups that the global batch of every slot is cut into
    epochs: tuple[float, float]  # from, to
    steps: tuple[int, int]  # first, one past the last

    @property
    def num_steps(self) -> int:
        """Steps in this phase."""
        return self.steps[1] - self.steps[0]

    @property
    def batch(self) -> int:
        """Global batch of the long-cycle grid."""
        return self.slots[-1].batch

    def slot(self, step: int) -> Slot:
        """The slot of a step of this phase (counted from the run's start)."""
        return self.slots[(step - self.steps[0]) % len(self.slots)]

    def steps_per_slot(self, steps: int | None = None) -> tuple[int, ...]:
        """How many of the phase's first `steps` steps (all, by default) run each slot."""
        done = self.num_steps if steps is None else steps
        return tuple(-((i - done) // len(self.slots)) for i in range(len(self.slots)))

    def clips(self, steps: int | None = None) -> int:
        """Clips that the phase's first `steps` steps (all, by default) consume."""
        return sum(n * slot.batch for n, slot in zip(self.steps_per_slot(steps), self.slots, strict=True))


@dataclass(frozen=True)
class Plan:
    """A whole run: phases that follow each other without a gap, each at least one step long.

    Epochs grow linearly with the steps of a phase, from the phase's first epoch to its last, so that phase boundaries
    fall exactly on the epochs of the schedule whatever the size of the dataset.
    """

    base: Base
    schedule: str  # its name: baseline, short, long or multigrid
    dataset_size: int
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()  # what a person should know before the run starts, one line each

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.phases[-1].steps[1]

    @property
    def epochs(self) -> float:
        """Epochs of the whole run."""
        return self.phases[-1].epochs[1]

    def phase(self, step: int) -> Phase:
        """The phase of a step. Raises IndexError for a step outside the plan."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of a plan of {self.steps} steps")
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.steps[0]) - 1]

    def slot(self, step: int) -> Slot:
        """Grid and global batch of a step."""
        return self.phase(step).slot(step)

    def epoch(self, step: int) -> float:
        """Epochs done when a step starts; after the last step, all of them."""
        if step == self.steps:
            return self.epochs
        phase = self.phase(step)
        start, end = phase.epochs
        return start + (end - start) * ((step - phase.steps[0]) / phase.num_steps)

    def lr(self, step: int) -> float:
        """Learning rate of a step."""
        return self.lr_at(self.epoch(step))

    def lr_at(self, epoch: float) -> float:
        """Learning rate at an epoch.

        After a warm-up, which climbs in a line from `warmup_lr` to the LR that holds at its end, it is the base LR
        times the phase's factor. Under the cosine policy the factor holds no decay; half a cosine wave over the
        baseline's epochs takes its place, read at the baseline epoch that the run has come to: who has taken a share of
        an LR stage's steps stands at that share of the baseline's stage. So the LR steps bound the long cycles under
        both policies, a baseline's cosine is the usual one, and every schedule's reaches 0 as the run ends.
        """
        warmup = self.base.warmup_epochs
        if epoch < warmup:
            start = self.base.warmup_lr
            return start + (self._scheduled_lr(warmup) - start) * epoch / warmup
        return self._scheduled_lr(epoch)

    def _scheduled_lr(self, epoch: float) -> float:
        phase = self._phase_at(epoch)
        lr = self.base.lr * phase.lr_factor
        if self.base.lr_policy == "step":
            return lr
        return lr * (1 + math.cos(math.pi * self._baseline_epoch(phase, epoch) / self.base.epochs)) / 2

    def _phase_at(self, epoch: float) -> Phase:
        return self.phases[max(0, bisect_right(self.phases, epoch, key=lambda phase: phase.epochs[0]) - 1)]

    def _baseline_epoch(self, phase: Phase, epoch: float) -> float:
        """The epoch of the baseline that has taken the same share of its LR stage as this run at `epoch`."""
        steps = [other.steps for other in self.phases if other.stage == phase.stage]
        first, end = steps[0][0], steps[-1][1]
        start, stop = phase.epochs
        step = phase.steps[0] + phase.num_steps * (min(epoch, stop) - start) / (stop - start)
        bounds = self.base.lr_bounds
        return bounds[phase.stage] + (bounds[phase.stage + 1] - bounds[phase.stage]) * (step - first) / (end - first)

    def clips_before(self, step: int) -> int:
        """Clips consumed by all steps before `step`."""
        done = [(phase, min(step, phase.steps[1]) - phase.steps[0]) for phase in self.phases]
        return sum(phase.clips(steps) for phase, steps in done if steps > 0)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dump`; `Plan.from_json` gives an equal plan back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises UserError where keys are missing or unknown."""
        try:
            phases = tuple(_phase_from(phase) for phase in data["phases"])
            return cls(**{**_tuples(data), "base": Base(**data["base"]), "phases": phases})
        except (KeyError, TypeError) as error:
            raise UserError(f"this is not a plan that this version of mgvideo wrote: {error}") from error


def require(ok: bool, message: str) -> None:
    """Raises UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


def finite_or_nan(value: object) -> float:
    """The value itself if it is a finite number, else NaN, which passes no comparison."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _phase_from(data: dict[str, Any]) -> Phase:
    slots = tuple(Slot(_grid_from(slot["grid"]), slot["batch"]) for slot in data["slots"])
    return Phase(**{**_tuples(data), "grid": _grid_from(data["grid"]), "slots": slots})


def _grid_from(data: dict[str, Any]) -> Grid:
    return Grid(**_tuples(data))


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples: those of a dataclass come back as lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
