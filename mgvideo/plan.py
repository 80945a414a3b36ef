"""The plan of a run: what is trained on at every step, at which learning rate, known before training starts.

Pure data and arithmetic, no torch. `mgvideo.schedule` makes plans; everything else asks them.
"""

from __future__ import annotations

from dataclasses import dataclass


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

    def slot(self, step: int) -> Slot:
        """The slot of a step of this phase (counted from the run's start)."""
        return self.slots[(step - self.steps[0]) % len(self.slots)]
