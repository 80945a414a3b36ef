"""One optimizer step on a rank's shard of a batch: copy it to the device, run its micro-batches, update weights."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mgvideo.distributed.collectives import Subgroups, world_size
from mgvideo.distributed.watchdog import Position
from mgvideo.layers.batchnorm import deferred_running_stats, set_bn_groups
from mgvideo.layers.dropout import dropout_for_clips
from mgvideo.loading.loader import Batch
from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.plan.plan import Grid, Plan, Slot
from mgvideo.plan.shards import BatchShard

from .ema import ModelEma
from .freezing import frozen_in_finish, frozen_modules, set_training_mode
from .micro_batches import explain_out_of_memory, split_into_micro_batches, suggest_micro_batch_clips
from .precision import Normalize, Precision
from .skippable_step import SkippableStep
from .tasks import Task

if TYPE_CHECKING:
    from .augmentation import Augmentation


class TrainStep:
    """Takes a plan's optimizer steps.

    Args:
        model: on its device, converted by `convert_group_batchnorm`.
        micro_batch_clips: number of clips of the base grid that a rank runs at once at most.
        clip_grad_norm: gradients of the whole step with a larger norm, over all parameters, are scaled down to it.
        ema: decay of the moving average of the weights, see `ModelEma`; None: no average.
        compile: "off", or a mode of torch.compile.
        position: each forward and backward is reported to it before it runs.
        hang_timeout: seconds that this rank may take for one part of a step; 0: no limit. A slot's first step has no
            limit, because it may compile for minutes.
        augmentation: changes the clips and their labels on the device; None: nothing does.

    Attributes:
        bad_step: the first step whose loss or gradients were not finite, -1 if there is none; int64 scalar on the
            device, so that the host need not wait for it.
        grad_norm: the norm of the last step's gradients, before they are clipped; scalar on the device.
        ema: the moving average of the weights, None if there is none.
        frozen: names of the modules that keep their weights; they stay in evaluation mode.
        subgroups: process groups of the ranks that share a BN group.
        wrapped_model: the model inside DDP (with several ranks) and torch.compile (unless it is off).
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        task: Task,
        optimizer: Optimizer,
        *,
        seed: int,
        normalize: Normalize,
        precision: Precision,
        micro_batch_clips: int,
        clip_grad_norm: float | None = None,
        ema: float | None = None,
        compile: str = "off",
        position: Position | None = None,
        hang_timeout: float = 0.0,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.model, self.plan, self.task, self.optimizer = model, plan, task, optimizer
        self.seed, self.normalize, self.precision = seed, normalize, precision
        self.micro_batch_clips, self.compile, self.augmentation = micro_batch_clips, compile, augmentation
        self.clip_grad_norm, self.frozen = clip_grad_norm, frozen_modules(model)
        self.ema = None if ema is None else ModelEma(model, plan, ema)
        self.position, self.hang_timeout = position or Position(), hang_timeout
        self.subgroups = Subgroups()
        self.device = precision.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.dtype is torch.float16)
        self.skippable_step = SkippableStep(optimizer, continues=self.scaler.is_enabled())
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.warmed_up: set[tuple[Slot, int]] = set()  # slots that have run, with their number of BN groups
        # Copy clips while the GPU still computes the previous step.
        self.copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._frozen_in_finish = frozen_in_finish(model)
        self.wrapped_model: nn.Module = model
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # Every rank computes the same buffers, so DDP need not send them. torch 2.15 renames the argument.
            arguments = signature(DistributedDataParallel).parameters
            sync = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
            options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
            self.wrapped_model = DistributedDataParallel(model, device_ids=ids, **options)
        if compile != "off":
            self.wrapped_model = compile_model(self.wrapped_model, compile, plan)

    def __call__(self, step: int, batch: Batch) -> Tensor:
        """Take step number `step` on this rank's `batch`.

        Returns:
            This rank's part of the mean loss over the global batch: a scalar on the device.

        Raises:
            UserError: the device or the host is out of memory; the message names the config key to lower.
        """
        assert batch.shard is not None, "a training batch carries its shard"
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(step) * group.get("lr_scale", 1.0)
        with explain_out_of_memory(partial(self._explain_out_of_memory, step, batch.shard)):
            self.report_position(step, "augmenting", 1, has_time_limit=False)
            total = self._accumulate(step, batch.shard, *self.load_on_device(step, batch))
            self._update(step, total)
        return total

    def report_position(self, step: int, activity: str, part: int, has_time_limit: bool) -> None:
        """Report what this rank does during a step; `part` orders the activities of the step."""
        limit = self.hang_timeout if has_time_limit and self.hang_timeout else None
        self.position.report(f"at {self.plan.describe(step)}, {activity}", (step, part), limit)

    def _explain_out_of_memory(self, step: int, shard: BatchShard) -> str:
        """Say where memory ran out, and which config key to lower."""
        grid = self.plan.slot(step).grid
        micro_batches = split_into_micro_batches(shard, self.clips_per_micro_batch(grid))
        clips = max(stop - start for start, stop, _ in micro_batches)
        lower = suggest_micro_batch_clips(clips, grid, self.plan.base)
        if lower is None:
            advice = "choose a smaller model, base.crop_size or base.num_frames, or precision=bf16"
        else:
            advice = f"try train.micro_batch_clips={lower} (now {self.micro_batch_clips})"
        return f"at {self.plan.describe(step)}, where this rank runs {clips} clips at once: {advice}"

    def clips_per_micro_batch(self, grid: Grid) -> int:
        """Return how many clips of a grid to run at once."""
        return max(1, self.micro_batch_clips * self.plan.base.num_frames * self.plan.base.crop_size**2 // grid.volume)

    def load_on_device(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the augmented clips, still uint8, and the labels on the device. All ranks call this together."""
        clips, labels = self._copy_to_device(batch)
        if self.augmentation is None:
            return clips, labels
        assert batch.shard is not None, "a training batch carries its shard"
        assert batch.seeds is not None, "a training batch carries its seeds"
        group = self.subgroups.of_size(len(batch.shard.ranks))
        return self.augmentation(clips, labels, batch.seeds, batch.shard, group, self.plan.slot(step).strength)

    def _copy_to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the clips, still uint8, and the labels on the device."""
        if self.copy_stream is None:
            return batch.clips.to(self.device), batch.labels.to(self.device)
        with torch.cuda.stream(self.copy_stream):
            clips = batch.clips.to(self.device, non_blocking=True)
            labels = batch.labels.to(self.device, non_blocking=True)
        compute_stream = torch.cuda.current_stream(self.device)
        compute_stream.wait_stream(self.copy_stream)
        for tensor in (clips, labels):  # allocated on one stream, used on the other
            tensor.record_stream(compute_stream)
        return clips, labels

    def _accumulate(self, step: int, shard: BatchShard, clips: Tensor, labels: Tensor) -> Tensor:
        """Accumulate the gradients of the mean loss over the global batch; return this rank's part of that loss."""
        slot = self.plan.slot(step)
        micro_batches = split_into_micro_batches(shard, self.clips_per_micro_batch(slot.grid))
        group = self.subgroups.of_size(len(shard.ranks))
        total = torch.zeros((), device=self.device)
        # The seed of dropout depends on the run's seed and the step, not on the rank. So all ranks draw the same
        # numbers, and a resumed run needs no generator state.
        seed = random_seed(self.seed, Stream.DROPOUT, step)
        graph = (slot, self.plan.phase(step).bn_groups)
        # A slot's first step may take minutes: it compiles, and on a GPU cuDNN times its kernels.
        warms_up = self.compile != "off" or self.device.type == "cuda"
        has_time_limit = not warms_up or graph in self.warmed_up
        set_training_mode(self.model, self.frozen)
        self.optimizer.zero_grad(set_to_none=True)
        with deferred_running_stats(self.model):
            for i, (start, stop, groups) in enumerate(micro_batches):
                self.report_position(step, "forward", 2 * i + 1, has_time_limit)
                set_bn_groups(self.model, groups, group)
                torch.manual_seed(seed)
                with ExitStack() as stack:
                    clip_range = shard.start + start, shard.start + stop
                    stack.enter_context(dropout_for_clips(self.model, shard.batch, *clip_range, slot.strength))
                    if i < len(micro_batches) - 1:  # DDP averages gradients once a step, in the last micro-batch
                        stack.enter_context(getattr(self.wrapped_model, "no_sync", nullcontext)())
                    pixels = self.normalize(clips[start:stop])
                    with self.precision.autocast():
                        logits = self.wrapped_model(pixels)
                    loss = self.task.loss(logits.to(pixels.dtype), labels[start:stop]) / shard.batch
                    self.report_position(step, "backward", 2 * i + 2, has_time_limit)
                    # The loss is already a part of the mean over the global batch, so gradients must be summed over
                    # ranks. DDP averages them: undo that.
                    self.scaler.scale(loss * world_size()).backward()
                total = total + loss.detach()
        self.warmed_up.add(graph)
        return total

    def _update(self, step: int, loss: Tensor) -> None:
        """Step the optimizer. From the first non-finite loss or gradient on, skip all steps, so that weights stay good.

        In fp16 the scaled gradients sometimes overflow: such a step is skipped, the scale is halved and training
        continues. At a scale of 1, which other precisions always have, an overflow means that the gradients themselves
        are not finite.
        """
        if self.plan.phase(step).trains == "head":
            for parameter in self._frozen_in_finish:
                parameter.grad = None  # the optimizer skips it, also its weight decay and momentum
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])  # the same on all ranks
        overflow = ~torch.isfinite(self.grad_norm)
        scale = self.scaler.scale(torch.ones((), device=self.device))
        bad = ~torch.isfinite(loss) | (overflow & (scale <= 1))
        self.bad_step = torch.where(bad & (self.bad_step < 0), step, self.bad_step)
        skip = (self.bad_step >= 0) | overflow
        if self.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, self.grad_norm)
        self.skippable_step(skip)
        if self.ema is not None:
            self.ema.update(step, skip)
        self.scaler.update()


def compile_model(model: nn.Module, mode: str, plan: Plan) -> nn.Module:
    """Compile a model with torch.compile, one graph of static shapes a slot; parameters and buffers are shared."""
    slots = {(slot, phase.bn_groups) for phase in plan.phases for slot in phase.slots}
    # The micro-batches of a slot may differ in size by one BN group, which takes further graphs.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(slots))
    return torch.compile(model, mode=mode, dynamic=False)  # type: ignore[return-value]
