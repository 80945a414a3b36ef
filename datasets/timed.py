"""Datasets whose labels are actions with times: a training clip has the labels of the actions that it shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .decoders import Decoder
from .sampling import Sampling
from .video import VideoDataset, VideoEntry


class Action(NamedTuple):
    """An action: its class, and start and end in seconds, both inclusive."""

    label: int
    start: float
    end: float


class TimedDataset(VideoDataset):
    """A multi-label dataset whose labels are actions with times."""

    timed_labels = True

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        actions: Sequence[Sequence[Action]],
        class_names: Sequence[str],
        decoder: Decoder | None,
        sampling: Sampling,
        frames_fps: float | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        labels = [tuple(sorted({action.label for action in group})) for group in actions]
        entries = [VideoEntry(path, label) for path, label in zip(paths, labels, strict=True)]
        times = {
            "actions": np.array([action for group in actions for action in group], np.float64).reshape(-1, 3),
            "action_bounds": np.cumsum([0, *(len(group) for group in actions)]),
        }
        super().__init__(root, entries, class_names, decoder, sampling, notes, frames_fps=frames_fps, more_arrays=times)

    def _fingerprint_parts(self) -> Iterator[bytes]:
        yield from super()._fingerprint_parts()
        yield self.arrays["actions"].tobytes()
        yield self.arrays["action_bounds"].tobytes()

    def label(self, index: int, seconds: tuple[float, float] | None = None) -> Tensor:
        """Return multi-hot labels, float32 `[classes]`, of the actions that overlap `seconds`, or of all actions."""
        if seconds is None:
            return super().label(index)
        labels, starts, ends = self._rows(index).T
        multi_hot = torch.zeros(len(self.class_names))
        multi_hot[labels[(starts <= seconds[1]) & (ends >= seconds[0])].astype(np.int64)] = 1
        return multi_hot

    def actions(self, index: int) -> list[Action]:
        """Return the actions of a video."""
        return [Action(int(label), start, end) for label, start, end in self._rows(index).tolist()]

    def _rows(self, index: int) -> np.ndarray:
        first, stop = self.arrays["action_bounds"][index : index + 2]
        return self.arrays["actions"][first:stop]
