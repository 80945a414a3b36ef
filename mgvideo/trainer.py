"""The training loop: it asks the plan what a step is, and knows nothing of multigrid beyond that."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .batches import Batches, Share, share
from .batchnorm import deferred_running_stats, set_bn_groups
from .checkpoint import Checkpoints
from .clips import Failure
from .distributed import Votes, barrier, gather_objects, neighbours, rank, world_size
from .dropout import dropout_of
from .errors import UserError
from .evaluate import Beat, Evaluator, Views, precise_bn
from .loader import Batch, Loader
from .microbatch import pieces
from .monitor import Monitor
from .plan import Phase, Plan, Slot
from .precision import Normalize, Precision
from .profiling import Profiler
from .schedule import baseline_of
from .signals import Stopped, received
from .tasks import Task
from .watch import at
from .window import Progress, Window

_NOTHING, _SAVE, _STOP = range(3)  # what a rank may ask for after a step
_LAST = 1 << 30  # the last part of a step, after all micro-batches


@dataclass(frozen=True)
class TrainOptions:
    """How often things happen around the steps, and what memory holds."""

    max_clips: int  # clips of the base grid that a rank runs at once
    log_every: int = 10  # steps
    evals_per_phase: int = 1
    precise_bn_batches: int = 200  # 0: none
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
        monitor: Monitor,
        checkpoints: Checkpoints,
        validate: tuple[Evaluator, Views] | None = None,
    ) -> None:
        self.model, self.plan, self.task, self.optimizer, self.loader = model, plan, task, optimizer, loader
        self.seed, self.normalize, self.precision, self.options = seed, normalize, precision, options
        self.monitor, self.checkpoints, self.validate = monitor, checkpoints, validate
        self.batches = Batches(plan, len(loader.dataset), seed)
        self.progress = Progress()
        self.device = precision.device
        self.votes = Votes(self._wish)
        self.saved = time.monotonic()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.dtype is torch.float16)
        # first step whose loss or gradients were not finite, -1 for none; lives on the device so that nothing waits
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.not_validated: set[Failure] = set(monitor.listed)  # named once, however often validation meets them
        self.window = Window()
        self._window_state: dict[str, Any] | None = None
        self.profiler = Profiler(monitor.folder / "profile", options.profile)
        self.compiled: set[tuple[Slot, int]] = set()  # what has run: slots with their BN groups
        # clips travel beside the computation of the step before
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.parallel: nn.Module = model
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(
                model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if options.compile != "off":
            self.parallel = compiled(self.parallel, options.compile, plan)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; all ranks call it together."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dict(vars(self.progress)),
            "window": self.window.state() if self.window.steps else None,
            "plan": self.plan.to_json(),
            "max_clips": {"ranks": world_size(), "clips": self.options.max_clips},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken; the optimizer's settings are those it was made with, not the saved ones.

        Raises:
            UserError: the checkpoint is of another network.
        """
        settings = [{key: group[key] for key in group.keys() - {"params"}} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
            raise UserError(f"the checkpoint does not fit this network and optimizer: {reason}") from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        if state["scaler"]:  # of a run in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
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
        at("after training")

    def _steps(self, evaluations: set[int]) -> None:
        start = self.progress.step
        batches = self._stream(start)
        phase: Phase | None = None
        state, self._window_state = self._window_state, None
        self.window = Window.resumed(state, self.device) if state else Window()
        self.monitor.start_progress(start)
        for step in range(start, self.plan.steps):
            self.votes.cast()
            self._at(step, "waiting for a batch", 0, watched=self.loader.options.workers == 0)
            waiting = time.perf_counter()
            batch = next(batches)
            self.window.waited += time.perf_counter() - waiting
            if phase is not self.plan.phase(step):
                phase = self.plan.phase(step)
                if step == phase.steps[0]:
                    self.monitor.clips(step, self.plan.phases.index(phase), batch.clips)
            self.step(step, batch)
            done = self.progress.step = step + 1
            wish = self.votes.result()
            self._at(step, "logging and writing a checkpoint", _LAST, watched=False)
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

    def _wish(self) -> int:
        """What this rank asks for after the step: nothing, a checkpoint, or to stop."""
        if received():
            return _STOP
        minutes = self.options.checkpoint_minutes
        return _SAVE if minutes and rank() == 0 and time.monotonic() - self.saved > 60 * minutes else _NOTHING

    def _stop(self) -> None:
        self.monitor.stop_progress()
        self.checkpoints.wait()
        barrier()  # launchers end the others when one has left, rank 0 as it writes too
        raise Stopped(received() or signal.SIGTERM)

    def _at(self, step: int, doing: str, part: int, watched: bool = True) -> None:
        """Tell the other ranks where this one is."""
        limit = self.options.hang_timeout if watched and self.options.hang_timeout else None
        phase = self.plan.phases.index(self.plan.phase(step))
        at(f"at step {step} (phase {phase + 1}, {_grid_name(self.plan, step)}), {doing}", (step, part), limit)

    def step(self, step: int, batch: Batch) -> None:
        """One optimizer step on this rank's share of the global batch."""
        phase, slot = self.plan.phase(step), self.plan.slot(step)
        part = share(slot.batch, phase.bn_groups, rank(), world_size())
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(step)
        total = self._accumulate(step, part, *self._transferred(batch))
        self._update(step, total)
        window = self.window
        window.loss = total.double() if window.loss is None else window.loss + total
        window.steps += 1
        window.clips += slot.batch
        window.read += len(batch.labels)
        window.failures += batch.failures

    def _transferred(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Clips, uint8 still, and labels, on the device."""
        if self.copies is None:
            return batch.clips.to(self.device), batch.labels.to(self.device)
        with torch.cuda.stream(self.copies):
            clips = batch.clips.to(self.device, non_blocking=True)
            labels = batch.labels.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.copies)
        for tensor in (clips, labels):  # made on one stream, freed on the other
            tensor.record_stream(computing)
        return clips, labels

    def _accumulate(self, step: int, part: Share, clips: Tensor, labels: Tensor) -> Tensor:
        """Gradients of the mean loss over the global batch; returns this rank's part of that loss."""
        slot = self.plan.slot(step)
        volume, batch = slot.grid.volume, slot.batch
        limit = max(1, self.options.max_clips * self.plan.base.frames * self.plan.base.size**2 // volume)
        cuts = pieces(part, limit)
        group = neighbours(len(part.ranks))
        total = torch.zeros((), device=self.device)
        # dropout draws from (seed, step), whatever the rank: a resumed run needs no generator state
        seed = int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
        graph = (slot, self.plan.phase(step).bn_groups)
        watched = self.options.compile == "off" or graph in self.compiled  # compiling may take minutes
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with deferred_running_stats(self.model):
            for i, piece in enumerate(cuts):
                self._at(step, "forward", 2 * i + 1, watched)
                set_bn_groups(self.model, piece.groups, group)
                torch.manual_seed(seed)
                with ExitStack() as stack:
                    first = part.start + piece.start
                    stack.enter_context(dropout_of(self.model, batch, first, first + piece.stop - piece.start))
                    if piece is not cuts[-1]:  # ranks exchange gradients once a step
                        stack.enter_context(getattr(self.parallel, "no_sync", nullcontext)())
                    pixels = self.normalize(clips[piece.start : piece.stop])
                    with self.precision.autocast():
                        logits = self.parallel(pixels)
                    loss = self.task.loss(logits.to(pixels.dtype), labels[piece.start : piece.stop]) / batch
                    self._at(step, "backward", 2 * i + 2, watched)
                    # DDP averages over ranks, which may hold different numbers of clips: undo it here
                    self.scaler.scale(loss * world_size()).backward()
                total = total + loss.detach()
        self.compiled.add(graph)
        return total

    def _update(self, step: int, loss: Tensor) -> None:
        """Step the optimizer, but not from the first non-finite loss or gradient on: the weights stay the last good."""
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.isfinite(loss)
        if not self.scaler.is_enabled():  # under fp16 the scaler skips overflowing gradients itself
            finite &= torch.isfinite(torch.stack(torch._foreach_norm(grads)).sum())
        first_bad = ~finite & (self.bad_step < 0)
        self.bad_step = torch.where(first_bad, step, self.bad_step)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        # what the fused kernel reads to skip a step without asking the host
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (self.bad_step >= 0).float()  # type: ignore
        self.optimizer.step()

    def _check_finite(self) -> None:
        bad = int(self.bad_step)
        if bad < 0:
            return
        phase = self.plan.phases.index(self.plan.phase(bad))
        steps = self.checkpoints.steps()
        good = f"the last good checkpoint is {self.checkpoints.path(steps[-1])}" if steps else "no checkpoint was taken"
        raise UserError(
            f"loss or gradients are not finite at step {bad} (phase {phase + 1}, {_grid_name(self.plan, bad)}, "
            f"lr {self.plan.lr(bad):.4g}): the step was not taken; {good}. Lower base.lr or lengthen the warm-up"
        )

    def _stream(self, step: int) -> Iterator[Batch]:
        """This rank's batches from `step` on, the loader rebuilt at each phase."""

        def requests(s: int) -> list:
            part = share(self.plan.slot(s).batch, self.plan.phase(s).bn_groups, rank(), world_size())
            return self.batches(s)[part.start : part.stop]

        stretches = [range(max(step, p.steps[0]), p.steps[1]) for p in self.plan.phases if p.steps[1] > step]
        return self.loader.phases(requests, stretches)

    def _log(self, phase: Phase) -> None:
        """Bring the window's figures to the host, record them, and start a new one."""
        window, step = self.window, self.progress.step
        assert window.loss is not None
        loss = float(window.loss)
        self._check_finite()
        self.checkpoints.check()  # a full disk is told now, not when the next checkpoint is due
        elapsed = time.perf_counter() - window.since
        self.progress.seconds += elapsed
        ranks = gather_objects((loss, window.failures, window.read, window.waited))
        failures = [failure for r in ranks for failure in r[1]]
        self.progress.clips += sum(r[2] for r in ranks)
        self.progress.bad += len(failures)
        slot = self.plan.slot(step - 1)
        index = self.plan.phases.index(phase)
        self.monitor.eta.add(index, elapsed, window.steps)
        cuda = self.device.type == "cuda"
        self.monitor.train(
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
                "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30 if cuda else _resident_gib(), 3),
                "seconds": round(self.progress.seconds, 3),
            }
        )
        if failures:
            self.monitor.failures(step, failures)
        clips, bad = self.progress.clips, self.progress.bad
        if clips >= 100 and bad > self.options.max_bad_fraction * clips:
            raise UserError(
                f"{bad} of {clips} clips could not be read, more than dataset.max_bad_fraction="
                f"{self.options.max_bad_fraction:g}: see {self.monitor.folder / 'bad_videos.csv'}"
            )
        self.window = Window()

    def _evaluate(self) -> None:
        """Precise BN, the validation metrics, and a checkpoint of both; a signal leaves at once."""
        assert self.validate is not None
        evaluator, views = self.validate
        step = self.progress.step
        self.precise_bn()
        result = evaluator(self.model, views, self.beat("validating", -2))
        at(f"after step {step}, recording its evaluation", (step, -1))
        metrics = self.task.metrics(result.scores, result.labels)
        self.monitor.validation(step, self.progress.seconds, metrics)
        new = [failure for failure in result.failures if failure not in self.not_validated]
        if new:
            self.monitor.failures(step, new)
            self.not_validated.update(new)
        best = metrics[self.task.best] > self.progress.best
        if best:
            self.progress.best, self.progress.best_step = metrics[self.task.best], step
        self.progress.evaluated = step
        self._save(best)
        self.window = Window()  # evaluation is not training time

    def beat(self, doing: str, part: int) -> Beat:
        """Tells the other ranks of each batch outside of training; `part`, below 0, orders what follows on a step."""
        step, limit = self.progress.step, self.options.hang_timeout or None
        loads = self.loader.options.workers == 0  # workers have a limit of their own

        def tell(done: int, of: int, waiting: bool) -> None:
            watched = not waiting or (loads and done < of)
            at(f"after step {step}, {doing}, batch {done} of {of}", (step, part, done), limit if watched else None)

        return tell

    def precise_bn(self) -> None:
        """Exact BN statistics for the weights as they are, from batches that depend on the step alone."""
        if not self.options.precise_bn_batches:
            return
        seed = int(np.random.SeedSequence([self.seed, self.progress.step]).generate_state(1)[0])
        plan = baseline_of(self.plan)
        batches = Batches(plan, len(self.loader.dataset), seed)
        steps = min(self.options.precise_bn_batches, batches.plan.steps)
        beat, clips = self.beat("in precise BN", -3), self.options.max_clips
        precise_bn(self.model, self.loader, batches, steps, self.normalize, self.precision, clips, beat)

    def _save(self, best: bool = False) -> None:
        """Write a checkpoint in the background; what was logged before it goes to disk before it."""
        self._check_finite()
        state = self.state()
        if rank() == 0:
            self.monitor.flush()
            self.checkpoints.save(self.progress.step, state, best)
            self.saved = time.monotonic()


def compiled(model: nn.Module, mode: str, plan: Plan) -> nn.Module:
    """`model` through torch.compile, one graph of static shapes for each slot; parameters and buffers are shared."""
    slots = {(slot, phase.bn_groups) for phase in plan.phases for slot in phase.slots}
    # micro-batches of a slot may differ by a group
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(slots))
    return torch.compile(model, mode=mode, dynamic=False)  # type: ignore[return-value]


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


def _resident_gib() -> float:
    return psutil.Process().memory_info().rss / 2**30
