"""A trace of some training steps, for TensorBoard or Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mgvideo.distributed.collectives import rank

WARM_UP = 3  # steps that run before the trace, which choose kernels and compile


class Profiler:
    """Records the steps that follow the first few of a run (or of its resumption), on rank 0.

    Leaves `rank0.pt.trace.json`, which Perfetto and TensorBoard's profiler plugin open, and `kernels.txt`, what took
    longest, in `folder`. With no steps it does nothing.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._profile: profile | None = None

    def start(self) -> None:
        """Before the first step."""
        if not self.steps or rank() != 0:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        when = schedule(wait=WARM_UP - 1, warmup=1, active=self.steps, repeat=1)
        self._profile = profile(activities=activities, schedule=when, on_trace_ready=self._write, record_shapes=True)
        self._profile.start()

    def step(self) -> None:
        """After each step."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        """After the last step; a run shorter than the trace was to be leaves what there is."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / "rank0.pt.trace.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages(group_by_input_shape=True).table(sort_by=order, row_limit=30)
        (self.folder / "kernels.txt").write_text(table, encoding="utf-8")
