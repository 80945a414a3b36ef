"""Counters of a training run: its progress, and sums since the last log step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import torch
from torch import Tensor

from mgvideo.distributed.collectives import gather_objects, rank
from mgvideo.loading.loader import Batch
from mgvideo.loading.requests import DecodeFailure


@dataclass
class TrainProgress:
    """The progress of a run, which a checkpoint holds besides weights and optimizer."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training, without evaluation
    best: float = -1.0  # the best validation metric so far
    best_step: int = 0
    evaluated: int = 0  # the step of the last evaluation
    clips: int = 0  # clips read up to the last log step, over all ranks
    bad: int = 0  # those of them whose video could not be read
    hardware: str = ""  # in words; several, separated by "; ", if the run moved
    precision: str = ""  # likewise
    date: str = ""  # ISO date and time of the last start or resumption

    def record_environment(self, hardware: str, precision: str) -> None:
        """Record the hardware and precision that the next steps run on, and the date.

        Reports show these, even if the final test runs on other hardware.
        """
        self.hardware = _append_unique(self.hardware, hardware)
        self.precision = _append_unique(self.precision, precision)
        self.date = datetime.now().astimezone().isoformat(timespec="seconds")


def _append_unique(items: str, item: str) -> str:
    """Append an item to a list separated by "; ", unless it is there."""
    return "; ".join(dict.fromkeys([*filter(None, items.split("; ")), item]))


@dataclass
class RunningMetrics:
    """Sums since the last log step."""

    start_time: float = field(default_factory=time.perf_counter)
    loss: Tensor | None = None  # sum of step losses, on the device; exact in float64, whatever the order
    grad_norm: Tensor | None = None  # sum of the gradients' finite norms, and their number; float64 on the device
    steps: int = 0
    clips: int = 0  # over all ranks
    clips_read: int = 0  # by this rank
    bad_clips: int = 0  # those of them whose video could not be read, each counted once even with several substitutes
    wait_s: float = 0.0  # seconds that this rank waited for batches
    failures: list[DecodeFailure] = field(default_factory=list)

    def add(self, loss: Tensor, grad_norm: Tensor, batch: Batch, global_batch_size: int) -> None:
        """Add a training step: its loss and the norm of its gradients, scalars on the device, and this rank's batch."""
        self.loss = loss.double() if self.loss is None else self.loss + loss
        is_finite = torch.isfinite(grad_norm)
        norm = torch.stack((torch.where(is_finite, grad_norm, 0).double(), is_finite.double()))
        self.grad_norm = norm if self.grad_norm is None else self.grad_norm + norm
        self.steps += 1
        self.clips += global_batch_size
        self.clips_read += len(batch.labels)
        self.failures += batch.failures
        self.bad_clips += batch.bad_clips

    def mean_grad_norm(self) -> float | None:
        """Return the mean norm of the gradients, over the steps where it is finite; None if there are none."""
        total, steps = (0.0, 0.0) if self.grad_norm is None else self.grad_norm.tolist()
        return total / steps if steps else None

    def state(self) -> dict[str, Any]:
        """Return plain values combined over ranks, so that a resumed run logs the same as one that was not stopped.

        All ranks call it together.
        """
        loss = torch.zeros((), dtype=torch.float64) if self.loss is None else self.loss.cpu()
        failures = [tuple(vars(failure).values()) for failure in self.failures]
        rank_values = gather_objects((loss, self.clips_read, self.wait_s, failures, self.bad_clips))
        losses, clips_read, waits_s, failure_lists, bad_clips = zip(*rank_values, strict=True)
        return {
            "loss": sum(losses[1:], start=losses[0]),
            "grad_norm": None if self.grad_norm is None else self.grad_norm.cpu(),
            "steps": self.steps,
            "clips": self.clips,
            "read": sum(clips_read),
            "waited": max(waits_s),
            "failures": [failure for rank_failures in failure_lists for failure in rank_failures],
            "bad": sum(bad_clips),
            "seconds": time.perf_counter() - self.start_time,
        }

    @classmethod
    def resumed(cls, state: dict[str, Any], device: torch.device) -> RunningMetrics:
        """Restore metrics from `state`. Rank 0 gets the sums over all ranks, the other ranks start from zero."""
        metrics = cls(time.perf_counter() - state["seconds"], steps=state["steps"], clips=state["clips"])
        if rank() == 0:
            metrics.loss = state["loss"].to(device)
            if state.get("grad_norm") is not None:  # missing in checkpoints of earlier versions
                metrics.grad_norm = state["grad_norm"].to(device)
            metrics.clips_read, metrics.bad_clips, metrics.wait_s = state["read"], state["bad"], state["waited"]
            metrics.failures = [DecodeFailure(*values) for values in state["failures"]]
        return metrics
