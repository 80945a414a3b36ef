"""The tests' videos and network with a fault: what one rank, or a loader worker of it, suffers."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgvideo.datasets import motion as real
from mgvideo.loading.requests import BatchRequest, ClipRequest, Sample, View
from mgvideo.plan.plan import Grid

GRID = Grid(4, 24, (1, 3), (28, 40))


class Faulty:
    """A dataset with a fault on one rank, after so many clips.

    `once` names a file that the fault creates, and that suppresses it afterwards; `given` one that has to exist first.
    """

    def __init__(self, dataset: Any, fault: str, rank: int, after: int, once: str | None, given: str | None) -> None:
        self.dataset, self.fault, self.rank, self.after, self.once = dataset, fault, rank, after, once
        self.given = given
        self.read = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by pickle before there is a dataset
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: ClipRequest) -> Sample:
        self.read += 1
        if os.environ.get("RANK", "0") == str(self.rank) and self.read > self.after and self._due():
            self._fail()
        return self.dataset[request]

    def _due(self) -> bool:
        if self.given is not None and not os.path.exists(self.given):
            return False
        if self.once is None:
            return True
        try:
            Path(self.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _fail(self) -> None:
        if self.fault == "raise":
            raise ValueError("a fault made by the tests")
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "exit":
            sys.exit(0)
        if self.fault == "ctrl-c":  # a terminal sends it to all processes of the foreground group
            os.killpg(os.getpgrp(), signal.SIGINT)
            return
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "ask": signal.SIGTERM}[self.fault])


def motion(
    fault: str, rank: int = 1, after: int = 60, once: str | None = None, given: str | None = None, **arguments: Any
) -> Faulty:
    """`mgvideo.datasets.motion.motion` with a fault."""
    return Faulty(real.motion(**arguments), fault, rank, after, once, given)


def overrides(fault: str, videos: str = "train", **options: object) -> list[str]:
    """The same, for the command line of the run program."""
    extra = {"fault": fault, **options}
    given = [f"+dataset.{videos}.{key}={value}" for key, value in extra.items()]
    return [f"dataset.{videos}._target_=faults.motion", *given]


class FaultyNetwork(nn.Module):
    """A network with a fault in training: `bad_loss`, once after so many forward passes, or `dropout`, always."""

    def __init__(self, network: nn.Module, fault: str, after: int, once: str) -> None:
        super().__init__()
        self.network, self.fault, self.after, self.once = network, fault, after, Path(once)
        self.steps = 0

    def forward(self, clips: Tensor) -> Tensor:
        logits = self.network(clips)
        if self.fault == "dropout":
            return F.dropout(logits, 0.1, self.training)
        if self.training and torch.is_grad_enabled():
            self.steps += 1
            if self.steps > self.after and not self.once.exists():
                self.once.touch()
                return logits * float("nan")
        return logits


def network(fault: str, after: int = 0, once: str = "", **arguments: Any) -> FaultyNetwork:
    """`mgvideo.models.small.r2plus1d_small` with a fault."""
    from mgvideo.models.small import r2plus1d_small  # loader workers import this module, and need no network

    return FaultyNetwork(r2plus1d_small(**arguments), fault, after, once)


def requests(step: int) -> BatchRequest:
    """Three clips; in a module that loader workers import quickly. All steps but the first have three crops of each."""
    view = View(0, 1, 3) if step else None
    return BatchRequest([ClipRequest(index, GRID, 10 * step + index, view) for index in range(3)])
