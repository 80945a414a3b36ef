"""One optimizer step on a rank's shard of a batch: copy to the device, forward and backward by micro-batch, update."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mgvideo.distributed.collectives import bn_process_group, world_size
from mgvideo.layers.batchnorm import deferred_running_stats, set_bn_groups
from mgvideo.layers.dropout import dropout_of
from mgvideo.loading.loader import Batch
from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.plan.plan import Grid, Plan, Slot
from mgvideo.plan.shards import BatchShard

from .micro_batches import explain_out_of_memory, fewer_clips, split_into_micro_batches
from .optimizers import SkippableStep
from .precision import Normalize, Precision
from .tasks import Task


class TrainStep:
    """Takes a plan's optimizer steps.

    At most `micro_batch_clips` clips of the base grid are run at once. `tell(step, doing, part, watched)` hears where a step
    is, and whether that may last. `bad_step` is the first step whose loss or gradients were not finite, -1 for none;
    it lives on the device, so that nothing waits.
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
        compile: str,
        tell: Callable[[int, str, int, bool], None],
    ) -> None:
        self.model, self.plan, self.task, self.optimizer = model, plan, task, optimizer
        self.seed, self.normalize, self.precision = seed, normalize, precision
        self.micro_batch_clips, self.compile, self.tell = micro_batch_clips, compile, tell
        self.device = precision.device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.dtype is torch.float16)
        self.skippable_step = SkippableStep(optimizer, continues=self.scaler.is_enabled())
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.prepared: set[tuple[Slot, int]] = set()  # slots that have run, with their BN groups
        # clips travel beside the computation of the step before
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.parallel: nn.Module = model
        if world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            # Every rank computes the same buffers. torch 2.15 renames the argument.
            arguments = signature(DistributedDataParallel).parameters
            sync = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
            options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
            self.parallel = DistributedDataParallel(model, device_ids=ids, **options)
        if compile != "off":
            self.parallel = compiled(self.parallel, compile, plan)

    def __call__(self, step: int, batch: Batch) -> Tensor:
        """Take a step on a batch that carries its shard.

        Returns this rank's part of the mean loss over the global batch, on the device.
        """
        assert batch.shard is not None, "a training batch carries its shard"
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(step)
        with explain_out_of_memory(partial(self._explain_out_of_memory, step, batch.shard)):
            total = self._accumulate(step, batch.shard, *self._transferred(batch))
            self._update(step, total)
        return total

    def _explain_out_of_memory(self, step: int, shard: BatchShard) -> str:
        """Where memory ran out, and the key to lower."""
        grid, phase = self.plan.slot(step).grid, self.plan.phases.index(self.plan.phase(step))
        clips = max(stop - start for start, stop, _ in split_into_micro_batches(shard, self._limit(grid)))
        lower = fewer_clips(clips, grid, self.plan.base)
        if lower is None:
            advice = "choose a smaller model, base.crop_size or base.num_frames, or precision=bf16"
        else:
            advice = f"try train.micro_batch_clips={lower} (now {self.micro_batch_clips})"
        place = f"at step {step} (phase {phase + 1}, {grid.frames}×{grid.size}²)"
        return f"{place}, where this rank runs {clips} clips at once: {advice}"

    def _limit(self, grid: Grid) -> int:
        """How many clips of a grid to run at once."""
        return max(1, self.micro_batch_clips * self.plan.base.num_frames * self.plan.base.crop_size**2 // grid.volume)

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

    def _accumulate(self, step: int, shard: BatchShard, clips: Tensor, labels: Tensor) -> Tensor:
        """Accumulate gradients of the mean loss over the global batch; return this rank's part of that loss."""
        slot = self.plan.slot(step)
        micro_batches = split_into_micro_batches(shard, self._limit(slot.grid))
        group = bn_process_group(len(shard.ranks))
        total = torch.zeros((), device=self.device)
        # Dropout's seed depends on (seed, step) alone, not on the rank, and a resumed run needs no generator state.
        seed = random_seed(self.seed, Stream.DROPOUT, step)
        graph = (slot, self.plan.phase(step).bn_groups)
        # A slot's first step may take minutes: it compiles, and on a GPU cuDNN times its kernels.
        prepares = self.compile != "off" or self.device.type == "cuda"
        watched = not prepares or graph in self.prepared
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with deferred_running_stats(self.model):
            for i, (start, stop, groups) in enumerate(micro_batches):
                self.tell(step, "forward", 2 * i + 1, watched)
                set_bn_groups(self.model, groups, group)
                torch.manual_seed(seed)
                with ExitStack() as stack:
                    stack.enter_context(dropout_of(self.model, shard.batch, shard.start + start, shard.start + stop))
                    if i < len(micro_batches) - 1:  # ranks exchange gradients once a step
                        stack.enter_context(getattr(self.parallel, "no_sync", nullcontext)())
                    pixels = self.normalize(clips[start:stop])
                    with self.precision.autocast():
                        logits = self.parallel(pixels)
                    loss = self.task.loss(logits.to(pixels.dtype), labels[start:stop]) / shard.batch
                    self.tell(step, "backward", 2 * i + 2, watched)
                    # DDP averages over ranks, which may hold different numbers of clips: undo it here
                    self.scaler.scale(loss * world_size()).backward()
                total = total + loss.detach()
        self.prepared.add(graph)
        return total

    def _update(self, step: int, loss: Tensor) -> None:
        """Step the optimizer, but not from the first non-finite loss or gradient on: the weights stay the last good.

        In fp16 the scaled gradients overflow now and then: such a step is skipped, the scale is halved and training
        continues. Gradients that overflow at a scale of 1, which it is in other precisions, are not finite themselves.
        """
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        overflow = ~torch.isfinite(torch.stack(torch._foreach_norm(grads)).sum())
        scale = self.scaler.scale(torch.ones((), device=self.device))
        bad = ~torch.isfinite(loss) | (overflow & (scale <= 1))
        self.bad_step = torch.where(bad & (self.bad_step < 0), step, self.bad_step)
        self.skippable_step((self.bad_step >= 0) | overflow)
        self.scaler.update()


def compiled(model: nn.Module, mode: str, plan: Plan) -> nn.Module:
    """`model` through torch.compile, one graph of static shapes for each slot; parameters and buffers are shared."""
    slots = {(slot, phase.bn_groups) for phase in plan.phases for slot in phase.slots}
    # micro-batches of a slot may differ by a group
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(slots))
    return torch.compile(model, mode=mode, dynamic=False)  # type: ignore[return-value]
