"""Micro-batches: parts of a rank's shard that fit into memory, made of whole BN groups where possible."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mgvideo.errors import UserError
from mgvideo.plan.plan import Base, Grid, Plan
from mgvideo.plan.shards import BatchShard

from .precision import Precision, without_cudnn_benchmark

MEMORY_SHARE = 0.6  # fraction of free memory for saved activations; the rest is for gradients, workspace and inputs
MAX_MEMORY_SHARE = 0.8  # the same for a resumed run, which should keep the number of clips that it started with


class MicroBatch(NamedTuple):
    """Clips `[start, stop)` of a rank's shard, run at once, in `groups` BN groups."""

    start: int
    stop: int
    groups: int


def split_into_micro_batches(shard: BatchShard, limit: int) -> list[MicroBatch]:
    """Cut a shard into the fewest micro-batches of at most `limit` clips, never inside a BN group that fits.

    If not even one group fits, groups shrink: each micro-batch is normalised by its own clips. Ranks that share a
    group get the same number of micro-batches, because each micro-batch runs a collective operation.
    """
    clips = shard.stop - shard.start
    if len(shard.ranks) > 1:
        largest = math.ceil(shard.group_size / len(shard.ranks))
        count = min(shard.group_size // len(shard.ranks), math.ceil(largest / limit))
        return [MicroBatch(i * clips // count, (i + 1) * clips // count, 1) for i in range(count)]
    size = shard.group_size
    groups_that_fit = limit // size
    if groups_that_fit == 0:
        parts = math.ceil(size / limit)
        bounds = [g * size + i * size // parts for g in range(shard.groups) for i in range(parts)] + [clips]
        return [MicroBatch(a, b, 1) for a, b in pairwise(bounds)]
    count = math.ceil(shard.groups / groups_that_fit)
    bounds = [i * shard.groups // count for i in range(count + 1)]
    return [MicroBatch(a * size, b * size, b - a) for a, b in pairwise(bounds)]


def clips_that_fit(model: nn.Module, grid: Grid, precision: Precision, host_memory: int) -> int:
    """Estimate how many clips of `grid` fit into memory in a training step, at least 1.

    Measures the activations that the forward pass of two clips saves for backward, on a copy of the model. They may
    take `MEMORY_SHARE` of the free memory: of the GPU, or of the `host_memory` bytes on a CPU. With activation
    checkpointing, which marks blocks by the attribute `recompute`, these are the inputs of the blocks, and all that the
    largest block saves while backward runs it again.
    """
    model = copy.deepcopy(model).train()
    blocks = [module for module in model.modules() if getattr(module, "recompute", False)]
    clip_bytes = _saved_bytes(model, grid, precision) / 2
    if blocks:
        for block in blocks:
            block.recompute = False  # type: ignore[assignment]
        clip_bytes += max(_saved_bytes_by_block(model, blocks, grid, precision)) / 2
    if precision.device.type == "cuda":
        torch.cuda.empty_cache()  # otherwise memory that earlier probes freed counts as used
        free = torch.cuda.mem_get_info(precision.device)[0]
    else:
        free = host_memory
    return max(1, int(MEMORY_SHARE * free / clip_bytes))


def _saved_bytes(model: nn.Module, grid: Grid, precision: Precision, saved: dict[int, int] | None = None) -> int:
    """Return the bytes that the forward pass of two clips saves for backward, without parameters.

    `saved` is filled with the bytes of each storage by its address, in the order in which they are saved.
    """
    saved = {} if saved is None else saved
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = next(model.parameters()).dtype
    clips = torch.zeros(2, grid.frames, grid.size, grid.size, 3, dtype=dtype, device=precision.device)
    hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
    with hooks, precision.autocast(), without_cudnn_benchmark():
        output = model(clips.permute(0, 4, 1, 2, 3))
    del output
    return sum(saved.values())


def _saved_bytes_by_block(model: nn.Module, blocks: list[nn.Module], grid: Grid, precision: Precision) -> list[int]:
    """Return the bytes that the forward pass of two clips saves inside of each block."""
    saved: dict[int, int] = {}
    bounds = []  # how much is saved before and after each block
    hooks = [block.register_forward_pre_hook(lambda *_: bounds.append(sum(saved.values()))) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: bounds.append(sum(saved.values()))) for block in blocks]
    _saved_bytes(model, grid, precision, saved)
    for hook in hooks:
        hook.remove()
    return [after - before for before, after in zip(bounds[::2], bounds[1::2], strict=True)]


def largest_step_clips(plan: Plan, ranks: int) -> float:
    """Return the volume of a plan's largest step per rank, without micro-batches, in clips of the base grid."""
    largest = max(slot.batch * slot.grid.volume for phase in plan.phases for slot in phase.slots)
    return largest / (plan.base.num_frames * plan.base.crop_size**2 * ranks)


def suggest_micro_batch_clips(clips: int, grid: Grid, base: Base) -> int | None:
    """Return a value of `micro_batch_clips` that halves micro-batches of `clips` clips of a grid.

    Returns 1 if no value halves them but 1 makes them smaller, and None if no value does.
    """
    base_volume = base.num_frames * base.crop_size**2
    lower = max(1, clips // 2 * grid.volume // base_volume)
    return lower if max(1, lower * base_volume // grid.volume) < clips else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that the memory of the device or of the host is exhausted."""
    text = str(error).lower()
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in words)
    )


@contextmanager
def explain_out_of_memory(explanation: Callable[[], str]) -> Iterator[None]:
    """Turn out-of-memory errors inside the block into UserError("out of memory " + explanation())."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {explanation()}") from error
