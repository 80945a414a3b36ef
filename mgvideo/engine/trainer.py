"""The training loop: it asks the plan what a step is, and knows nothing of multigrid beyond that."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from mgvideo.distributed.collectives import RequestSync, barrier, gather_objects, rank, world_size
from mgvideo.distributed.signals import Stopped, received_signal
from mgvideo.distributed.watchdog import report_position
from mgvideo.errors import NonFiniteError, UserError
from mgvideo.loading.loader import Batch, Loader
from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.loading.requests import DecodeFailure
from mgvideo.loading.sampler import ClipSampler
from mgvideo.plan.plan import Phase, Plan
from mgvideo.plan.schedules import baseline_of
from mgvideo.storage.checkpoints import Checkpoints
from mgvideo.tracking.profiler import Profiler
from mgvideo.tracking.run_logger import RunLogger

from .evaluation import Evaluator, ProgressCallback, Views, precise_bn
from .optimizers import load_optimizer_state
from .precision import Normalize, Precision
from .running_metrics import RunningMetrics, TrainProgress
from .tasks import Task
from .train_step import TrainStep

_NOTHING, _SAVE, _STOP = range(3)  # what a rank may ask for after a step
_LAST = 1 << 30  # the last part of a step, after all micro-batches


@dataclass(frozen=True)
class TrainOptions:
    """How often things happen around the steps, and what memory holds."""

    micro_batch_clips: int  # clips of the base grid that a rank runs at once
    log_every: int = 10  # steps
    evals_per_phase: int = 1
    precise_bn_clips: int = 12_800  # 0: none
    checkpoint_every: int = 0  # steps; phase ends always
    checkpoint_minutes: float = 0.0  # 0: never by time
    max_bad_fraction: float = 0.05  # of the clips read
    hang_timeout: float = 45.0  # seconds that ranks wait for one of them; 0: for ever
    compile: str = "off"  # or a mode of torch.compile
    profile: int = 0  # steps to trace


class Trainer:
    """Trains a model along a plan.

    The model carries GroupBatchNorm3d and lies on its device; `validate` evaluates at `views`, or never where it is
    None. All ranks build the same trainer.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        task: Task,
        optimizer: Optimizer,
        loader: Loader,
        *,
        seed: int,
        normalize: Normalize,
        precision: Precision,
        options: TrainOptions,
        monitor: RunLogger,
        checkpoints: Checkpoints,
        validate: tuple[Evaluator, Views] | None = None,
    ) -> None:
        self.model, self.plan, self.task, self.optimizer, self.loader = model, plan, task, optimizer, loader
        self.seed, self.normalize, self.precision, self.options = seed, normalize, precision, options
        self.monitor, self.checkpoints, self.validate = monitor, checkpoints, validate
        self.sampler = ClipSampler(plan, len(loader.dataset), seed)
        self.progress = TrainProgress()
        self.device = precision.device
        self.stepper = TrainStep(
            model, plan, task, optimizer, seed=seed, normalize=normalize, precision=precision,
            micro_batch_clips=options.micro_batch_clips, compile=options.compile, tell=self._at,
        )  # fmt: skip
        self.votes = RequestSync(self._requested_action)
        self.saved = time.monotonic()
        self.not_validated: set[DecodeFailure] = set(
            monitor.listed_failures
        )  # named once, however often validation meets them
        self.window = RunningMetrics()
        self._window_state: dict[str, Any] | None = None
        self.profiler = Profiler(monitor.folder / "profile", options.profile)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; all ranks call it together."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.stepper.scaler.state_dict(),
            "progress": dict(vars(self.progress)),
            "window": self.window.state() if self.window.steps else None,
            "plan": self.plan.to_json(),
            "micro_batch_clips": {"ranks": world_size(), "clips": self.options.micro_batch_clips},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken; the optimizer's settings are those it was made with, not the saved ones.

        Raises:
            UserError: the checkpoint is of another network.
        """
        try:
            self.model.load_state_dict(state["model"])
            load_optimizer_state(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
            raise UserError(f"the checkpoint does not fit this network and optimizer: {reason}") from error
        if state["scaler"]:  # of a run in fp16
            self.stepper.scaler.load_state_dict(state["scaler"])
        self.progress = TrainProgress(**state["progress"])
        self._window_state = state["window"]

    def train(self) -> None:
        """Train from where the run is to the plan's end.

        Raises:
            Stopped: a signal asked for it; the step was finished and its checkpoint is on disk.
        """
        evaluations = _evaluation_steps(self.plan, self.options.evals_per_phase) if self.validate else set()
        if self.progress.step in evaluations and self.progress.evaluated < self.progress.step:
            self._evaluate()  # stopped in the middle of it
        self.profiler.start()
        try:
            self._steps(evaluations)
        finally:
            self.profiler.stop()  # a run that is stopped early leaves what it traced
        self.monitor.stop_progress()
        self.checkpoints.wait()
        report_position("after training")

    def _steps(self, evaluations: set[int]) -> None:
        start = self.progress.step
        batches = self._stream(start)
        phase: Phase | None = None
        state, self._window_state = self._window_state, None
        self.window = RunningMetrics.resumed(state, self.device) if state else RunningMetrics()
        self.monitor.start_progress(start)
        for step in range(start, self.plan.steps):
            self.votes.start()
            self._at(step, "waiting for a batch", 0, self.loader.options.num_workers == 0)
            waiting = time.perf_counter()
            batch = next(batches)
            self.window.waited += time.perf_counter() - waiting
            if phase is not self.plan.phase(step):
                phase = self.plan.phase(step)
                if step == phase.steps[0]:
                    self.monitor.log_clips(step, self.plan.phases.index(phase), batch.clips)
            self.step(step, batch)
            done = self.progress.step = step + 1
            wish = self.votes.wait()
            self._at(step, "logging and writing a checkpoint", _LAST, False)
            self.profiler.step()  # which may write a trace
            evaluates, ends = done in evaluations, done == phase.steps[1]
            if ends or evaluates or done % self.options.log_every == 0:
                self._log(phase)
            every = self.options.checkpoint_every
            if ends or evaluates or wish or (every and done % every == 0):
                self._save()
            if wish == _STOP:
                self._stop()
            if evaluates:
                self._evaluate()

    def _requested_action(self) -> int:
        """What this rank asks for after the step: nothing, a checkpoint, or to stop."""
        if received_signal():
            return _STOP
        minutes = self.options.checkpoint_minutes
        return _SAVE if minutes and rank() == 0 and time.monotonic() - self.saved > 60 * minutes else _NOTHING

    def _stop(self) -> None:
        self.monitor.stop_progress()
        self.checkpoints.wait()
        barrier()  # launchers end the others when one has left, rank 0 as it writes too
        raise Stopped(received_signal() or signal.SIGTERM)

    def _at(self, step: int, doing: str, part: int, watched: bool) -> None:
        """Tell the other ranks where this one is."""
        limit = self.options.hang_timeout if watched and self.options.hang_timeout else None
        phase = self.plan.phases.index(self.plan.phase(step))
        report_position(
            f"at step {step} (phase {phase + 1}, {_grid_name(self.plan, step)}), {doing}", (step, part), limit
        )

    def step(self, step: int, batch: Batch) -> None:
        """Take one optimizer step on this rank's shard of the global batch, which the batch carries."""
        loss = self.stepper(step, batch)
        window = self.window
        window.loss = loss.double() if window.loss is None else window.loss + loss
        window.steps += 1
        window.clips += self.plan.slot(step).batch
        window.read += len(batch.labels)
        window.failures += batch.failures
        window.bad += batch.bad_clips

    def _check_finite(self) -> None:
        """Raise NonFiniteError on all ranks where the loss or gradients of a step were not finite on one of them."""
        bad = min((step for step in gather_objects(int(self.stepper.bad_step)) if step >= 0), default=None)
        if bad is None:
            return
        phase = self.plan.phases.index(self.plan.phase(bad))
        with suppress(UserError):  # the last one may still be on its way to the disk
            self.checkpoints.wait()
        steps = self.checkpoints.steps()
        good = f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint was taken"
        raise NonFiniteError(
            f"loss or gradients are not finite at step {bad} (phase {phase + 1}, {_grid_name(self.plan, bad)}, "
            f"lr {self.plan.lr(bad):.4g}): the step was not taken; {good}"
        )

    def _stream(self, step: int) -> Iterator[Batch]:
        """Yield this rank's batches from `step` on; each phase has its own DataLoader."""
        requests = partial(self.sampler.shard, rank=rank(), world_size=world_size())
        stretches = [range(max(step, p.steps[0]), p.steps[1]) for p in self.plan.phases if p.steps[1] > step]
        return self.loader.load_phases(requests, stretches)

    def _log(self, phase: Phase) -> None:
        """Bring the window's figures to the host, record them, and start a new one."""
        window, step = self.window, self.progress.step
        assert window.loss is not None
        loss = float(window.loss)
        self._check_finite()
        self.checkpoints.check()  # a full disk is told now, not when the next checkpoint is due
        elapsed = time.perf_counter() - window.since
        self.progress.seconds += elapsed
        ranks = gather_objects((loss, window.failures, window.read, window.waited, window.bad))
        failures = [failure for r in ranks for failure in r[1]]
        self.progress.clips += sum(r[2] for r in ranks)
        self.progress.bad += sum(r[4] for r in ranks)
        slot = self.plan.slot(step - 1)
        index = self.plan.phases.index(phase)
        self.monitor.eta.add(index, elapsed, window.steps)
        cuda = self.device.type == "cuda"
        self.monitor.log_train_step(
            {
                "step": step,
                "epoch": round(self.plan.epoch(step), 4),
                "phase": index,
                "grid": slot.grid.name,
                "frames": slot.grid.frames,
                "size": slot.grid.size,
                "batch": slot.batch,
                "lr": self.plan.lr(step - 1),
                "loss": sum(r[0] for r in ranks) / window.steps,
                "clips_per_s": round(window.clips / elapsed, 2),
                "data_wait": round(max(r[3] for r in ranks) / elapsed, 4),
                "memory_gib": round(_peak_gib(self.device) if cuda else _resident_gib(), 3),
                "seconds": round(self.progress.seconds, 3),
            }
        )
        if failures:
            self.monitor.log_failures(step, failures)
        clips, bad = self.progress.clips, self.progress.bad
        if clips >= 100 and bad > self.options.max_bad_fraction * clips:
            raise UserError(
                f"{bad} of {clips} clips could not be read, more than dataset.max_bad_fraction="
                f"{self.options.max_bad_fraction:g}: see {self.monitor.folder / 'bad_videos.csv'}"
            )
        self.window = RunningMetrics()

    def _evaluate(self) -> None:
        """Precise BN, the validation metrics, and a checkpoint of both; a signal leaves at once."""
        assert self.validate is not None
        evaluator, views = self.validate
        step = self.progress.step
        self.precise_bn()
        result = evaluator(self.model, views, self.report_progress("validating", -2))
        report_position(f"after step {step}, recording its evaluation", (step, -1))
        metrics = self.task.metrics(result.scores, result.labels)
        self.monitor.log_validation(step, self.progress.seconds, metrics)
        new = [failure for failure in result.failures if failure not in self.not_validated]
        if new:
            self.monitor.log_failures(step, new)
            self.not_validated.update(new)
        best = metrics[self.task.best] > self.progress.best
        if best:
            self.progress.best, self.progress.best_step = metrics[self.task.best], step
        self.progress.evaluated = step
        self._save(best)
        self.window = RunningMetrics()  # evaluation is not training time

    def report_progress(self, doing: str, part: int) -> ProgressCallback:
        """Tells the other ranks of each batch outside of training; `part`, below 0, orders what follows on a step."""
        step, limit = self.progress.step, self.options.hang_timeout or None
        loads = self.loader.options.num_workers == 0  # workers have a limit of their own

        def tell(done: int, of: int, waiting: bool) -> None:
            watched = not waiting or (loads and done < of)
            report_position(
                f"after step {step}, {doing}, batch {done} of {of}", (step, part, done), limit if watched else None
            )

        return tell

    def precise_bn(self) -> None:
        """Replace BN's running statistics by exact ones of the current weights.

        The clips depend on the step alone: whole batches of the base grid, at most `precise_bn_clips` clips and one
        pass over the dataset, but at least one batch.
        """
        clips = self.options.precise_bn_clips
        if not clips:
            return
        plan, videos = baseline_of(self.plan), len(self.loader.dataset)
        sampler = ClipSampler(plan, videos, random_seed(self.seed, Stream.PRECISE_BN, self.progress.step))
        batches = max(1, min(clips, videos) // plan.base.batch_size)
        beat, limit = self.report_progress("in precise BN", -3), self.options.micro_batch_clips
        precise_bn(self.model, self.loader, sampler, batches, self.normalize, self.precision, limit, beat)

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint in the background; what was logged before it goes to disk before it."""
        self._check_finite()
        state = self.state()
        if rank() == 0:
            self.monitor.flush()
            self.checkpoints.save(self.progress.step, state, best)
            self.saved = time.monotonic()


def _evaluation_steps(plan: Plan, per_phase: int) -> set[int]:
    """Numbers of steps done at which to evaluate: `per_phase` evenly spaced points of each phase, its end the last."""
    points = set()
    for phase in plan.phases:
        first, stop = phase.steps
        points |= {first + round((i + 1) * (stop - first) / per_phase) for i in range(per_phase)}
    return points


def _grid_name(plan: Plan, step: int) -> str:
    grid = plan.slot(step).grid
    return f"{grid.frames}×{grid.size}²"


def _peak_gib(device: torch.device) -> float:
    """Most memory that tensors took on a GPU since the last call."""
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30


def _resident_gib() -> float:
    return psutil.Process().memory_info().rss / 2**30
