"""What a training run counts: where it is, and what happened since its last log step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from mgvideo.distributed.collectives import gather_objects, rank
from mgvideo.loading.requests import DecodeFailure


@dataclass
class TrainProgress:
    """Where a run is: what a checkpoint holds besides weights and optimizer."""

    step: int = 0
    seconds: float = 0.0  # of training, without evaluation
    best: float = -1.0
    best_step: int = 0
    evaluated: int = 0  # the step of the last evaluation
    clips: int = 0  # read up to the last log step
    bad: int = 0  # clips among them whose video could not be read
    hardware: str = ""  # that it trains on, in words; all of it, where it moved
    precision: str = ""  # the same
    date: str = ""  # on which it last began or went on

    def begins(self, hardware: str, precision: str) -> None:
        """Note what the steps from here on run on: whoever tests the run later tells of these, not of its own."""
        self.hardware = _with(self.hardware, hardware)
        self.precision = _with(self.precision, precision)
        self.date = datetime.now().astimezone().isoformat(timespec="seconds")


def _with(known: str, more: str) -> str:
    """Both in words, each once."""
    return "; ".join(dict.fromkeys([*filter(None, known.split("; ")), more]))


@dataclass
class RunningMetrics:
    """What happened since the last log step."""

    since: float = field(default_factory=time.perf_counter)
    loss: Tensor | None = None  # sum of step losses, on the device; in float64 it is exact, in whatever order
    steps: int = 0
    clips: int = 0
    read: int = 0  # clips, on this rank
    bad: int = 0  # clips among them whose video could not be read, however many substitutes it took
    waited: float = 0.0
    failures: list[DecodeFailure] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """Plain values, summed over ranks, so that a resumed run logs the same windows as an undisturbed one."""
        loss = torch.zeros((), dtype=torch.float64) if self.loss is None else self.loss.cpu()
        failures = [tuple(vars(failure).values()) for failure in self.failures]
        ranks = gather_objects((loss, self.read, self.waited, failures, self.bad))
        return {
            "loss": sum((r[0] for r in ranks[1:]), start=ranks[0][0]),
            "steps": self.steps,
            "clips": self.clips,
            "read": sum(r[1] for r in ranks),
            "waited": max(r[2] for r in ranks),
            "failures": [failure for r in ranks for failure in r[3]],
            "bad": sum(r[4] for r in ranks),
            "seconds": time.perf_counter() - self.since,
        }

    @classmethod
    def resumed(cls, state: dict[str, Any], device: torch.device) -> RunningMetrics:
        """The window that `state` was taken of: rank 0 carries what all ranks brought."""
        window = cls(time.perf_counter() - state["seconds"], steps=state["steps"], clips=state["clips"])
        if rank() == 0:
            window.loss = state["loss"].to(device)
            window.read, window.waited, window.bad = state["read"], state["waited"], state["bad"]
            window.failures = [DecodeFailure(*values) for values in state["failures"]]
        return window
