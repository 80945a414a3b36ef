"""The training loop. The plan defines each step, so that nothing here is specific to multigrid training."""

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

from mgvideo.distributed.collectives import RequestSync, barrier, gather_objects, rank, world_size
from mgvideo.distributed.signals import Stopped, received_signal
from mgvideo.errors import NonFiniteError, UserError, one_line
from mgvideo.loading.loader import Batch, Loader
from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.loading.sampler import ClipSampler
from mgvideo.plan.options import statistics_plan
from mgvideo.plan.plan import Plan
from mgvideo.storage.checkpoints import Checkpoints
from mgvideo.tracking.profiler import Profiler
from mgvideo.tracking.run_logger import RunLogger

from .evaluation import Evaluator, ProgressCallback, Views, precise_bn, report_batches
from .running_metrics import RunningMetrics, TrainProgress
from .skippable_step import load_optimizer_state
from .train_step import TrainStep

_CONTINUE, _SAVE, _STOP = range(3)  # actions after a step that a rank can request; the largest request wins
_END_OF_STEP = 1 << 30  # the last part of a step, after those of all micro-batches


@dataclass(frozen=True)
class TrainOptions:
    """Intervals, limits and modes of a training run."""

    log_every: int = 10  # steps
    evals_per_phase: int = 1
    precise_bn_clips: int = 12_800  # 0: no precise BN
    checkpoint_every: int = 0  # steps, besides the end of each phase; 0: only there
    checkpoint_minutes: float = 0.0  # 0: never by time
    max_bad_fraction: float = 0.05  # fraction of the clips read that may fail before the run ends
    profile: int = 0  # steps to trace


class Trainer:
    """Runs a training step for every step of a plan: loads batches, logs, saves checkpoints and evaluates.

    All ranks build the same trainer.

    Args:
        loader: of the training dataset.
        validate: the evaluator and the views to evaluate at; None to never evaluate.
        sampler: chooses the clips of each step; None: passes over the dataset that have each video once.
    """

    def __init__(
        self,
        train_step: TrainStep,
        loader: Loader,
        *,
        options: TrainOptions,
        logger: RunLogger,
        checkpoints: Checkpoints,
        validate: tuple[Evaluator, Views] | None = None,
        sampler: ClipSampler | None = None,
    ) -> None:
        self.train_step, self.loader, self.options = train_step, loader, options
        self.logger, self.checkpoints, self.validate = logger, checkpoints, validate
        self.model, self.plan, self.optimizer = train_step.model, train_step.plan, train_step.optimizer
        self.sampler = sampler or ClipSampler(self.plan, len(loader.dataset), train_step.seed)
        self.progress = TrainProgress()
        self.device = train_step.device
        self.request_sync = RequestSync(self._requested_action)
        self.last_save_time_s = time.monotonic()
        self.running_metrics = RunningMetrics()
        self._loaded_metrics: dict[str, Any] | None = None  # state of the running metrics, from a checkpoint
        self.profiler = Profiler(logger.folder / "profile", options.profile)

    @property
    def evaluated_model(self) -> nn.Module:
        """The network that is evaluated: the moving average of the weights if there is one."""
        return self.model if self.train_step.ema is None else self.train_step.ema.model

    def state(self) -> dict[str, Any]:
        """Return the contents of a checkpoint. All ranks call it together."""
        return {
            "model": self.model.state_dict(),
            **({} if self.train_step.ema is None else {"model_ema": self.evaluated_model.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_class": type(self.optimizer).__name__,
            "scaler": self.train_step.scaler.state_dict(),
            "progress": dict(vars(self.progress)),
            "window": self.running_metrics.state() if self.running_metrics.steps else None,
            "bad_videos": self.logger.bad_videos.state(),
            "plan": self.plan.to_json(),
            "micro_batch_clips": {"ranks": world_size(), "clips": self.train_step.micro_batch_clips},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Load a checkpoint, to continue from its step. The optimizer keeps its own settings, such as weight decay.

        Raises:
            UserError: the checkpoint belongs to another network or optimizer.
        """
        own_class = type(self.optimizer).__name__
        saved_class = state.get("optimizer_class", own_class)  # missing in checkpoints of earlier versions
        if saved_class != own_class:
            raise UserError(
                f"the checkpoint holds the state of {saved_class}, which is not for {own_class}: choose the same "
                "optimizer, or start from its weights with init_from=… and another output_dir"
            )
        try:
            self.model.load_state_dict(state["model"])
            if self.train_step.ema is not None:
                self.evaluated_model.load_state_dict(state.get("model_ema", state["model"]))
            load_optimizer_state(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit this network and optimizer: {one_line(error)}") from error
        if state["scaler"]:  # empty unless the run that saved it used fp16
            self.train_step.scaler.load_state_dict(state["scaler"])
        self.progress = TrainProgress(**state["progress"])
        self._loaded_metrics = state["window"]
        if "bad_videos" in state:  # missing in checkpoints of earlier versions
            self.logger.load_bad_videos(state["bad_videos"])

    def train(self) -> None:
        """Train from the current step to the end of the plan.

        Raises:
            Stopped: after a stop signal, once the step is finished and its checkpoint is on disk.
            NonFiniteError: the loss or gradients of a step are not finite.
            UserError: too many clips could not be read.
        """
        evaluations = _evaluation_steps(self.plan, self.options.evals_per_phase) if self.validate else set()
        self.logger.eta.evaluation_steps = evaluations
        if self.progress.step in evaluations and self.progress.evaluated < self.progress.step:
            self._evaluate()  # a signal interrupted this evaluation
        self.profiler.start()
        try:
            self._run_steps(evaluations)
        finally:
            self.profiler.stop()  # writes the trace even if the run stops early
        self.logger.stop_progress()
        self.checkpoints.wait()
        self.train_step.position.report("after training")

    def _run_steps(self, evaluations: set[int]) -> None:
        start = self.progress.step
        loaded, self._loaded_metrics = self._loaded_metrics, None
        self.running_metrics = RunningMetrics.resumed(loaded, self.device) if loaded else RunningMetrics()
        self.logger.start_progress(start)
        for step, batch in self._batches(start):
            loss = self.train_step(step, batch)
            self.running_metrics.add(loss, self.train_step.grad_norm, batch, self.plan.slot(step).batch)
            step_end = self.progress.step = step + 1
            request = self._end_step(step)
            evaluate, phase_ends = step_end in evaluations, step_end == self.plan.phase(step).steps[1]
            if phase_ends or evaluate or step_end % self.options.log_every == 0:
                self._log()
            every = self.options.checkpoint_every
            if phase_ends or evaluate or request != _CONTINUE or (every and step_end % every == 0):
                self._save()
            if request == _STOP:
                self._stop()
            if evaluate:
                self._evaluate()

    def _batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Yield the steps of the plan from `start` on, each with this rank's batch.

        Each phase has its own DataLoader. Before it waits for a batch, it starts to exchange the ranks' requests.
        """
        requests = partial(self.sampler.shard, rank=rank(), world_size=world_size())
        phase_steps = [range(max(start, p.steps[0]), p.steps[1]) for p in self.plan.phases if p.steps[1] > start]
        batches = self.loader.load_phases(requests, phase_steps)
        loads_here = self.loader.options.num_workers == 0  # loader workers have their own time limit
        for step in range(start, self.plan.steps):
            self.request_sync.start()
            self.train_step.report_position(step, "waiting for a batch", 0, loads_here)
            wait_start = time.perf_counter()
            batch = next(batches)
            self.running_metrics.wait_s += time.perf_counter() - wait_start
            phase = self.plan.phase(step)
            if step == phase.steps[0]:
                augments = self.train_step.augmentation is not None
                clips = self.train_step.load_on_device(step, batch)[0] if augments else batch.clips
                self.logger.log_clips(step, phase.index, clips)
            yield step, batch

    def _end_step(self, step: int) -> int:
        """Return the largest request of all ranks after a step."""
        request = self.request_sync.wait()
        self.train_step.report_position(step, "logging and writing a checkpoint", _END_OF_STEP, False)
        self.profiler.step()  # may write a trace
        return request

    def _requested_action(self) -> int:
        """Return the action that this rank requests after the step: to continue, to save a checkpoint, or to stop."""
        if received_signal():
            return _STOP
        minutes = self.options.checkpoint_minutes
        due = minutes and rank() == 0 and time.monotonic() - self.last_save_time_s > 60 * minutes
        return _SAVE if due else _CONTINUE

    def _stop(self) -> None:
        self.logger.stop_progress()
        self.checkpoints.wait()
        barrier()  # when one rank exits, launchers kill the rest, also rank 0 while it writes the checkpoint
        raise Stopped(received_signal() or signal.SIGTERM)

    def _check_finite(self) -> None:
        """Raise NonFiniteError on all ranks if the loss or gradients of a step were not finite on any of them."""
        bad_step = min((step for step in gather_objects(int(self.train_step.bad_step)) if step >= 0), default=None)
        if bad_step is None:
            return
        with suppress(UserError):  # the last checkpoint may not be on disk yet
            self.checkpoints.wait()
        steps = self.checkpoints.steps()
        last_good = (
            f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint was taken"
        )
        raise NonFiniteError(
            f"loss or gradients are not finite at {self.plan.describe(bad_step)} with LR "
            f"{self.plan.lr(bad_step):.4g}: the step was not taken; {last_good}"
        )

    def _log(self) -> None:
        """Log the running metrics over all ranks, and reset them. Waits for the device.

        Raises:
            UserError: too many clips could not be read, or the last checkpoint could not be written.
        """
        metrics, step = self.running_metrics, self.progress.step
        assert metrics.loss is not None
        loss, grad_norm = float(metrics.loss), metrics.mean_grad_norm()
        self._check_finite()
        self.checkpoints.check()  # report a full disk now, not at the next checkpoint
        elapsed = time.perf_counter() - metrics.start_time
        self.progress.seconds += elapsed
        rank_values = gather_objects((loss, metrics.failures, metrics.clips_read, metrics.wait_s, metrics.bad_clips))
        losses, failure_lists, clips_read, waits_s, bad_clips = zip(*rank_values, strict=True)
        failures = [failure for rank_failures in failure_lists for failure in rank_failures]
        self.progress.clips += sum(clips_read)
        self.progress.bad += sum(bad_clips)
        slot = self.plan.slot(step - 1)
        index = self.plan.phase(step - 1).index
        self.logger.eta.add(index, elapsed, metrics.steps)
        cuda = self.device.type == "cuda"
        self.logger.log_train_step(
            {
                "step": step,
                "epoch": round(self.plan.epoch(step), 4),
                "phase": index,
                "grid": slot.grid.name,
                "frames": slot.grid.frames,
                "size": slot.grid.size,
                "batch": slot.batch,
                "lr": self.plan.lr(step - 1),
                "loss": sum(losses) / metrics.steps,
                **({} if grad_norm is None else {"grad_norm": grad_norm}),
                "clips_per_s": round(metrics.clips / elapsed, 2),
                "data_wait": round(max(waits_s) / elapsed, 4),
                "memory_gib": round(_peak_gib(self.device) if cuda else _resident_gib(), 3),
                "seconds": round(self.progress.seconds, 3),
            }
        )
        if failures:
            self.logger.log_failures(step, failures, "train")
        clips, bad = self.progress.clips, self.progress.bad
        if clips >= 100 and bad > self.options.max_bad_fraction * clips:
            raise UserError(
                f"{bad} of {clips} clips could not be read, more than dataset.max_bad_fraction="
                f"{self.options.max_bad_fraction:g}: see {self.logger.folder / 'bad_videos.csv'}"
            )
        self.running_metrics = RunningMetrics()

    def _evaluate(self) -> None:
        """Run precise BN and validation, and save a checkpoint with their results.

        Raises:
            Stopped: at once after a stop signal; the resumed run repeats the evaluation.
        """
        assert self.validate is not None
        evaluator, views = self.validate
        step, started = self.progress.step, time.perf_counter()
        self.precise_bn()
        on_progress = self.logger.showing_progress("validation", self.progress_callback("validating", -2))
        result = evaluator(self.evaluated_model, views, on_progress)
        self.train_step.position.report(f"after step {step}, recording its evaluation", (step, -1))
        task = self.train_step.task
        metrics = task.metrics(result.scores, result.labels)
        self.logger.log_validation(step, self.progress.seconds, metrics)
        self.logger.log_failures(step, result.failures, "val")
        self.logger.eta.add_evaluation(time.perf_counter() - started)
        is_best = metrics[task.best] > self.progress.best
        if is_best:
            self.progress.best, self.progress.best_step = metrics[task.best], step
        self.progress.evaluated = step
        self._save(is_best)
        self.running_metrics = RunningMetrics()  # evaluation does not count as training time

    def progress_callback(self, activity: str, part: int) -> ProgressCallback:
        """Return a callback that reports each batch outside of training to the watchdog.

        `part` is below 0 and orders the activities that follow a step.
        """
        step, train_step = self.progress.step, self.train_step
        where = f"after step {step}, {activity}"
        loads_here = self.loader.options.num_workers == 0
        return report_batches(train_step.position, (step, part), where, train_step.hang_timeout, loads_here)

    def precise_bn(self) -> None:
        """Replace BN's running statistics in the evaluated network with exact ones for its current weights.

        Uses whole batches of the base grid, or of the finish if the plan has one: at most `precise_bn_clips` clips and
        one pass over the dataset, but at least one batch. Which clips depends on the step, so that a resumed run uses
        the same.
        """
        clips = self.options.precise_bn_clips
        if not clips:
            return
        plan, videos = statistics_plan(self.plan), len(self.loader.dataset)
        sampler = ClipSampler(plan, videos, random_seed(self.train_step.seed, Stream.PRECISE_BN, self.progress.step))
        batches = max(1, min(clips, videos) // plan.phases[0].batch)
        on_progress = self.logger.showing_progress("precise BN", self.progress_callback("in precise BN", -3))
        precise_bn(self.evaluated_model, self.train_step, self.loader, sampler, batches, on_progress)

    def _save(self, is_best: bool = False) -> None:
        """Write a checkpoint in the background, after flushing the log, which then reaches at least as far."""
        self._check_finite()
        state = self.state()
        if rank() == 0:
            self.logger.flush()
            self.checkpoints.save(self.progress.step, state, is_best)
            self.last_save_time_s = time.monotonic()


def _evaluation_steps(plan: Plan, per_phase: int) -> set[int]:
    """Return the numbers of steps done at which to evaluate: `per_phase` evenly spaced points a phase, with its end."""
    points = set()
    for phase in plan.phases:
        first, stop = phase.steps
        points |= {first + round((i + 1) * (stop - first) / per_phase) for i in range(per_phase)}
    return points


def _peak_gib(device: torch.device) -> float:
    """Return the peak memory in GiB that tensors took on a GPU since the last call."""
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30


def _resident_gib() -> float:
    return psutil.Process().memory_info().rss / 2**30
