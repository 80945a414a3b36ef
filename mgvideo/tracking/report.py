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

from .bad_videos import BadVideo


@dataclass(frozen=True)
class Report:
    """The plan, cost, scores and machine of a finished run."""

    name: str
    weights: str  # where the tested weights come from
    plan: Plan | None  # of the training; None if it is not known
    baseline_steps: int | None  # steps of the baseline plan
    hardware: str
    precision: str
    date: str  # of the training, as ISO 8601
    train_seconds: float  # without evaluations
    test_seconds: float
    metrics: dict[str, float]  # of the test, in percent; the first is the main one
    chance: float  # the main metric that guessing reaches, in percent
    views: str  # of each video, as "clips × crops"
    videos: int  # tested
    failures: tuple[DecodeFailure, ...]  # tested videos that could not be decoded
    folder: Path
    bad_training_videos: tuple[BadVideo, ...] = ()
    advice: tuple[str, ...] = ()  # commands to try next, and what each does

    def markdown(self) -> str:
        """Return the report as Markdown."""
        lines = [f"# {self.name}", "", *self._training()]
        scores = [f"{name} **{value:.2f} %**" for name, value in self.metrics.items()]
        scores[0] += f" (chance {self.chance:.1f} %)"
        lines.append(
            f"- test of {self.weights}: {', '.join(scores)} on {self.videos} held-out videos, {self.views} views each, "
            f"in {format_duration(self.test_seconds)}"
        )
        if self._is_chance():
            lines.append(
                "- **this is no better than guessing**: train for more steps (base.epochs), start from weights "
                "(init_from), or see 'Results at chance' in docs/faq.md"
            )
        lines += [f"- bad video, counted as wrong: {failure.path}: {failure.reason}" for failure in self.failures[:20]]
        if len(self.failures) > 20:
            lines.append(f"- and {len(self.failures) - 20} more bad videos, all in bad_videos.csv")
        lines += self._bad_training_videos()
        lines += [
            f"- everything is in `{self.folder}`",
            "- by video: `predictions.csv`; by class: `per_class.csv` and, for single labels, `confusion.png`",
            f"- curves and clips: `tensorboard --logdir {self.folder}`",
        ]
        if self.advice:
            lines += ["", "Try next:", "", *(f"- {line}" for line in self.advice)]
        return "\n".join(lines) + "\n"

    def _training(self) -> list[str]:
        """Return the lines on the training."""
        plan = self.plan
        if plan is None:
            return []
        grids = " → ".join(dict.fromkeys(phase.grid.name.replace("x", "×") + "²" for phase in plan.phases))
        comparison = ""
        if self.baseline_steps and plan.steps != self.baseline_steps:
            ratio = self.baseline_steps / plan.steps
            comparison = f"; the baseline takes {self.baseline_steps}, {ratio:.2f}× as many"
        return [
            f"- plan: {plan.schedule}, {len(plan.phases)} phases ({grids}), {plan.epochs:g} epochs "
            f"in {plan.steps} steps{comparison}",
            f"- training: {format_duration(self.train_seconds)} on {self.hardware}, {self.precision}",
        ]

    def _bad_training_videos(self) -> list[str]:
        """Return the lines on training videos that could not be read: their number, and the first of them."""
        videos = self.bad_training_videos
        if not videos:
            return []
        of = f" of {self.plan.dataset_size}" if self.plan else ""
        clips = sum(video.count for video in videos)
        lines = [f"- {len(videos)}{of} training videos could not be read; others replaced them, {clips} times"]
        lines += [f"- bad training video, {video.count} times: {video.path}: {video.reason}" for video in videos[:20]]
        if len(videos) > 20:
            lines.append(f"- and {len(videos) - 20} more bad training videos, all in bad_videos.csv")
        return lines

    def _is_chance(self) -> bool:
        """Whether the main metric is within two standard errors of what guessing reaches."""
        share = self.chance / 100
        standard_error = 100 * (share * (1 - share) / max(1, self.videos)) ** 0.5
        return next(iter(self.metrics.values())) <= self.chance + 2 * standard_error

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain data, with the date and torch's version. `mgvideo reproduce` reads it."""
        return {
            "name": self.name,
            "weights": self.weights,
            "schedule": self.plan and self.plan.schedule,
            "epochs": self.plan and self.plan.epochs,
            "steps": self.plan and self.plan.steps,
            "baseline_steps": self.baseline_steps,
            "train_seconds": self.train_seconds,
            "test_seconds": self.test_seconds,
            "metrics": self.metrics,
            "chance": self.chance,
            "views": self.views,
            "videos": self.videos,
            "bad_videos": len(self.failures),
            "bad_training_videos": len(self.bad_training_videos),
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
    return f"{cores} CPU core{'s' * (cores > 1)} ({name}), {world_size()} rank{'s' * (world_size() > 1)}"
