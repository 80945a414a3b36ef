"""Batch normalisation over groups of clips, with the same results on any number of ranks and micro-batches.

Each clip is normalised with the statistics of its group: consecutive clips of the batch, which may be a part of a
rank's batch or spread over several ranks.

1. `convert_group_batchnorm` converts a model's layers, once, before DDP and torch.compile.
2. `set_bn_groups` sets the groups before each forward pass.
3. `deferred_running_stats` wraps a training step.

Turn off DDP's `broadcast_buffers`: every rank computes the same running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mgvideo.cpu.batchnorm import fold_factor, stats_dtype
from mgvideo.errors import UserError

from .bn_kernels import MergedNormalise, choose_kernels
from .bn_statistics import GroupStatistics, add_deferred, sum_over_groups, update_running_stats

MAX_DEFERRED_FORWARDS = 16  # forward passes whose statistics a layer keeps before it adds them to its sums


class GroupBatchNorm3d(nn.BatchNorm3d):
    """`nn.BatchNorm3d` with statistics per group of clips; parameters, buffers and evaluation are the same.

    In training, a batch `[n, channels, t, h, w]` is split along n into `groups` chunks of equal size. With a process
    group, the i-th chunks of all its ranks form one BN group; the ranks may hold different numbers of clips.
    """

    running_mean: Tensor  # like the next two, None without track_running_stats
    running_var: Tensor
    num_batches_tracked: Tensor
    groups: int = 1
    process_group: dist.ProcessGroup | None = None
    # Inside deferred_running_stats: sums over the groups so far (see `sum_over_groups`), and statistics of the forward
    # passes not yet added to them. The sums are the same tensor in every step, as CUDA graphs require.
    deferring: bool = False
    deferred_sums: Tensor
    deferred_forwards: list[GroupStatistics]

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `[n, channels, t, h, w]`.

        Raises:
            UserError: in training, if n is not a multiple of `groups`.
        """
        super()._check_input_dim(input)
        output = self._normalise(input.flatten(2, 3))
        # _unsafe_view: autograd does not treat the result as a view, of which an in-place ReLU would copy the gradient.
        return torch.ops.aten._unsafe_view(output, input.shape)

    @contextmanager
    def _running_stats_kept(self) -> Iterator[None]:
        """Restore the running statistics at the end of the block."""
        kept = [(buffer, buffer.clone()) for buffer in self.buffers() if buffer is not None]
        yield
        for buffer, value in kept:
            buffer.copy_(value)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept the 4-D view that `_normalise` passes to `nn.BatchNorm3d.forward`; `forward` checks the input."""

    def _normalise(self, input: Tensor) -> Tensor:
        """Normalise `[n, channels, t · h, w]`.

        CUDA has fast kernels for channels_last only, and this view of a channels_last_3d tensor is channels_last.
        """
        single_group = self.groups == 1 and self.process_group is None
        recomputes = is_recomputing()
        if not self.training or (single_group and not self.deferring):
            if not (self.training and recomputes):
                return super().forward(input)
            with self._running_stats_kept():
                return super().forward(input)
        if input.shape[0] % self.groups:
            raise UserError(
                f"batch norm: {input.shape[0]} clips cannot be cut into {self.groups} equal groups; "
                "make the (micro-)batch of every rank a multiple of its number of groups"
            )
        fold = fold_factor(input, self.groups)  # 1 on a GPU
        if self.process_group is not None or fold > 1:
            output, mean, var = MergedNormalise.apply(
                input, self.weight, self.bias, self.groups, fold, self.eps, self.process_group
            )
            ranks = 1 if self.process_group is None else dist.get_world_size(self.process_group)
            statistics = GroupStatistics(mean, var, ranks)
        elif self.groups > 1:
            normalise = choose_kernels(input, self.groups)
            output, mean, invstd = normalise.apply(input, self.weight, self.bias, self.groups, self.eps)
            statistics = GroupStatistics(mean, invstd, size=input.numel() // mean.numel(), eps=self.eps)
        else:
            # With momentum 1, the kernel writes the statistics of this batch into its running statistics.
            mean, var = torch.zeros((2, 1, self.num_features), dtype=stats_dtype(input), device=input.device)
            output = F.batch_norm(input, mean[0], var[0], self.weight, self.bias, True, 1.0, self.eps)
            statistics = GroupStatistics(mean, var)
        if recomputes:
            return output
        if not self.deferring:
            if self.track_running_stats:
                update_running_stats([self], sum_over_groups(statistics))
        elif torch.compiler.is_compiling():  # compiled code fuses the additions, so keep nothing
            self.deferred_sums.add_(sum_over_groups(statistics))
        else:
            self.deferred_forwards.append(statistics)
            if len(self.deferred_forwards) == MAX_DEFERRED_FORWARDS:
                add_deferred([self])
        return output


def is_recomputing() -> bool:
    """Whether this forward pass runs inside of a backward pass, as activation checkpointing does.

    The statistics of its input are already counted then. Compiled code contains both passes, and updates buffers once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def convert_group_batchnorm(model: nn.Module) -> nn.Module:
    """Turn every `nn.BatchNorm3d` of a model into a `GroupBatchNorm3d`, in place, and return the model.

    The modules, their parameters, buffers and hooks stay the same objects. Layers that normalise each clip by itself,
    such as `nn.LayerNorm`, `nn.GroupNorm` and `nn.InstanceNorm3d`, stay unchanged.

    Raises:
        UserError: names a layer whose statistics would not be synchronised, and what to use instead.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = GroupBatchNorm3d
        elif advice := _replacement_advice(module):
            raise UserError(
                f"model: {name or 'the network itself'} ({type(module).__name__}) would have other statistics on each "
                f"rank and in each micro-batch: {advice}"
            )
    return model


def _replacement_advice(module: nn.Module) -> str | None:
    """Return what to use instead of a layer that cannot be converted; None for any other layer."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "set its track_running_stats to False" if module.track_running_stats else None
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or isinstance(module, GroupBatchNorm3d):
        return None
    if isinstance(module, nn.LazyBatchNorm3d):
        return "use nn.BatchNorm3d with its number of channels"
    if isinstance(module, nn.BatchNorm3d | nn.SyncBatchNorm):
        return "use nn.BatchNorm3d itself, whose groups of clips are shared among ranks automatically"
    return "use nn.BatchNorm3d on [clips, channels, frames, height, width], with dimensions of size 1 where needed"


def set_bn_groups(model: nn.Module, groups: int, process_group: dist.ProcessGroup | None = None) -> None:
    """Set the BN groups of all later training forwards: `groups` chunks, each shared by the ranks of `process_group`.

    Raises:
        UserError: `groups` is below 1.
    """
    if groups < 1:
        raise UserError(f"batch norm: {groups} groups of clips; there must be at least 1")
    if process_group is not None and dist.get_world_size(process_group) == 1:
        process_group = None
    for module in _layers(model):
        module.groups, module.process_group = groups, process_group


@contextmanager
def deferred_running_stats(
    model: nn.Module, world_group: dist.ProcessGroup | None = None, momentum: float | None = None
) -> Iterator[None]:
    """Update the running statistics once for all training forwards inside the block, over all ranks.

    Every BN group of every forward pass and rank has the same weight. The statistics accumulate on the device, in
    memory that does not grow with the number of forward passes. At the end of the block, one all-reduce covers all
    layers. An exception leaves the running statistics unchanged.

    Args:
        world_group: ranks to reduce over; all by default. Without torch.distributed there is no all-reduce.
        momentum: replaces the momentum of the layers. With 1, the running statistics become exactly those of the
            forward passes inside: precise BN (Wu and Johnson 2021, arXiv 2105.07576, section 3).
    """
    layers = [layer for layer in _layers(model) if layer.training and layer.track_running_stats]
    for layer in layers:
        sums, device = getattr(layer, "deferred_sums", None), layer.running_mean.device
        if sums is None or (sums.dtype, sums.device) != (torch.float64, device):  # missing, or changed by model.to()
            sums = torch.zeros((4, layer.num_features), dtype=torch.float64, device=device)
            layer.register_buffer("deferred_sums", sums, persistent=False)
        layer.deferring, layer.deferred_forwards = True, []
    if layers:
        torch._foreach_zero_([layer.deferred_sums for layer in layers])
    try:
        yield
        if layers:
            add_deferred(layers)
            sums = torch.cat([layer.deferred_sums for layer in layers], dim=1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums, group=world_group)
            update_running_stats(layers, sums, momentum)
    finally:
        for layer in layers:
            layer.deferring, layer.deferred_forwards = False, []


def _layers(model: nn.Module) -> list[GroupBatchNorm3d]:
    return [module for module in model.modules() if isinstance(module, GroupBatchNorm3d)]
