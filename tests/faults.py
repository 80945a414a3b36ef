"""The tests' dataset and network with a fault on one rank or in one of its loader workers."""

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
    """A dataset with a fault on one rank, after it has read a number of clips.

    Args:
        fault: "raise", "hang", "exit", "ctrl-c", "kill", "freeze" or "sigterm".
        after: the fault occurs from the clip after this number on.
        once: a file that the fault creates; while it exists there is no fault.
        required_file: the fault occurs only while this file exists.
    """

    def __init__(
        self, dataset: Any, fault: str, rank: int, after: int, once: str | None, required_file: str | None
    ) -> None:
        self.dataset, self.fault, self.rank, self.after, self.once = dataset, fault, rank, after, once
        self.required_file = required_file
        self.clips_read = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle looks these up before `dataset` is set
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: ClipRequest) -> Sample:
        self.clips_read += 1
        if os.environ.get("RANK", "0") == str(self.rank) and self.clips_read > self.after and self._is_due():
            self._fail()
        return self.dataset[request]

    def _is_due(self) -> bool:
        if self.required_file is not None and not os.path.exists(self.required_file):
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
        if self.fault == "ctrl-c":  # like a terminal, signal all processes of the foreground group
            os.killpg(os.getpgrp(), signal.SIGINT)
            return
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "sigterm": signal.SIGTERM}[self.fault])


def motion(
    fault: str,
    rank: int = 1,
    after: int = 60,
    once: str | None = None,
    required_file: str | None = None,
    **arguments: Any,
) -> Faulty:
    """Build `mgvideo.datasets.motion.motion` with a fault."""
    return Faulty(real.motion(**arguments), fault, rank, after, once, required_file)


def overrides(fault: str, split: str = "train", **options: object) -> list[str]:
    """Return overrides of the run program that give the dataset of a split ("train" or "val") a fault."""
    keys = {"fault": fault, **options}
    return [
        f"dataset.{split}._target_=faults.motion",
        *(f"+dataset.{split}.{key}={value}" for key, value in keys.items()),
    ]


class FaultyNetwork(nn.Module):
    """A network with a fault in training.

    "bad_loss": its output is NaN once, after `after` forward passes, if the file `once` does not exist. "dropout": it
    always calls dropout as a function.
    """

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
    """Build `mgvideo.models.small.r2plus1d_small` with a fault."""
    from mgvideo.models.small import r2plus1d_small  # here, because loader workers import this file

    return FaultyNetwork(r2plus1d_small(**arguments), fault, after, once)


def requests(step: int) -> BatchRequest:
    """Return requests for three clips, with three crops of each in all steps but the first.

    In this file because loader workers import it quickly.
    """
    view = View(0, 1, 3) if step else None
    return BatchRequest([ClipRequest(index, GRID, 10 * step + index, view) for index in range(3)])
