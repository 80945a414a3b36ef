"""Profile some training steps, for Perfetto or TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mgvideo.distributed.collectives import rank

WARM_UP_STEPS = 3  # steps before the trace: they select kernels and compile


class Profiler:
    """Traces `steps` steps on rank 0, after the first `WARM_UP_STEPS` of a run or of a resumed run.

    It writes two files to `folder`: `rank0.pt.trace.json`, for Perfetto and TensorBoard's profiler plugin, and
    `kernels.txt`, a table of the slowest operators. With `steps=0` it does nothing.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._profile: profile | None = None

    def start(self) -> None:
        """Start to profile. Call this before the first step."""
        if not self.steps or rank() != 0:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        step_schedule = schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=self.steps, repeat=1)
        self._profile = profile(
            activities=activities, schedule=step_schedule, on_trace_ready=self._write, record_shapes=True
        )
        self._profile.start()

    def step(self) -> None:
        """Count a step. Call this after each step."""
        if self._profile is not None:
            self._profile.step()

    def stop(self) -> None:
        """Stop, and write the trace if it is not yet written. Call this after the last step."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, trace: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(self.folder / "rank0.pt.trace.json"))
        sort_key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = trace.key_averages(group_by_input_shape=True).table(sort_by=sort_key, row_limit=30)
        (self.folder / "kernels.txt").write_text(table, encoding="utf-8")
