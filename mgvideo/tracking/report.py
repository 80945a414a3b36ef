"""The report at the end of a run: as Markdown on the terminal and in report.md, as data in report.json."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mgvideo.distributed.collectives import gather_objects, rank_cpus, world_size
from mgvideo.loading.requests import DecodeFailure
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Plan
from mgvideo.storage.files import write_atomic


@dataclass(frozen=True)
class Report:
    """The plan, cost, scores and machine of a finished run."""

    name: str
    plan: Plan
    baseline_steps: int  # steps of the baseline plan
    hardware: str
    precision: str
    date: str  # of the training, as ISO 8601
    train_seconds: float  # without evaluations
    test_seconds: float
    metrics: dict[str, float]  # of the test, in percent
    views: str  # of each video, as "clips × crops"
    videos: int  # tested
    failures: tuple[DecodeFailure, ...]  # tested videos that could not be decoded
    folder: Path
    advice: tuple[str, ...] = ()  # commands to try next, and what each does

    def markdown(self) -> str:
        """Return the report as Markdown."""
        plan = self.plan
        grids = " → ".join(dict.fromkeys(phase.grid.name.replace("x", "×") + "²" for phase in plan.phases))
        scores = ", ".join(f"{name} **{value:.2f} %**" for name, value in self.metrics.items())
        comparison = f"; the baseline takes {self.baseline_steps}, {self.baseline_steps / plan.steps:.2f}× as many"
        lines = [
            f"# {self.name}",
            "",
            f"- plan: {plan.schedule}, {len(plan.phases)} phases ({grids}), {plan.epochs:g} epochs "
            f"in {plan.steps} steps{comparison if plan.steps != self.baseline_steps else ''}",
            f"- training: {format_duration(self.train_seconds)} on {self.hardware}, {self.precision}",
        ]
        if self.metrics:
            lines += [
                f"- test: {scores} on {self.videos} held-out videos, {self.views} views each, "
                f"in {format_duration(self.test_seconds)}",
            ]
        lines += [f"- bad video, counted as wrong: {failure.path}: {failure.reason}" for failure in self.failures[:20]]
        if len(self.failures) > 20:
            lines.append(f"- and {len(self.failures) - 20} more bad videos, all in bad_videos.csv")
        lines += [
            f"- everything is in `{self.folder}`",
            f"- curves, clips and the confusion matrix: `tensorboard --logdir {self.folder}`",
        ]
        if self.advice:
            lines += ["", "Try next:", "", *(f"- {line}" for line in self.advice)]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data, with the date and torch's version. `mgvideo reproduce` reads it."""
        return {
            "name": self.name,
            "schedule": self.plan.schedule,
            "epochs": self.plan.epochs,
            "steps": self.plan.steps,
            "baseline_steps": self.baseline_steps,
            "train_seconds": self.train_seconds,
            "test_seconds": self.test_seconds,
            "metrics": self.metrics,
            "views": self.views,
            "videos": self.videos,
            "bad_videos": len(self.failures),
            "hardware": self.hardware,
            "precision": self.precision,
            "torch": str(torch.__version__),
            "date": self.date,
        }

    def write(self) -> None:
        """Write report.md and report.json to the run's folder."""
        write_atomic(self.folder / "report.md", self.markdown().encode(errors="replace"))
        write_atomic(self.folder / "report.json", json.dumps(self.as_json(), indent=1).encode())


def describe_hardware(device: torch.device) -> str:
    """Describe the GPUs or CPU cores of the run in words. All ranks call this together."""
    if device.type == "cuda":
        return f"{world_size()} × {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    cores = int(sum(gather_objects(rank_cpus())))
    return f"{cores} CPU cores ({name}), {world_size()} rank{'s' * (world_size() > 1)}"
