"""Batch normalisation over groups of clips, whatever the number of ranks and micro-batches that share a batch.

A clip's statistics come from its group: a run of clips, contiguous along the batch, that may be a part of a rank's
batch or spread over several ranks. `convert_group_batchnorm` makes a model's layers able to do so, once, before DDP
and torch.compile; `set_bn_groups` regroups them at a phase's start; `deferred_running_stats` wraps a training step.
Turn DDP's `broadcast_buffers` off: every rank computes the same running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import UserError

aten = torch.ops.aten


class GroupBatchNorm3d(nn.BatchNorm3d):
    """`nn.BatchNorm3d` with statistics per group of clips; parameters, buffers and evaluation are the same.

    In training a batch `[n, channels, t, h, w]` is cut along n into `groups` equal runs. With a process group, the
    i-th runs of all its ranks are one group; the ranks may hold different numbers of clips.
    """

    running_mean: Tensor  # None, as the two below, without track_running_stats
    running_var: Tensor
    num_batches_tracked: Tensor
    groups: int = 1
    process_group: dist.ProcessGroup | None = None
    pending: Tensor | None = None  # statistics of this step that wait for its end: see `_sums`

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `[n, channels, t, h, w]`; in training n must be a multiple of `groups`, or UserError."""
        alone = self.groups == 1 and self.process_group is None
        if not self.training or (alone and self.pending is None):
            return super().forward(input)
        self._check_input_dim(input)
        if input.shape[0] % self.groups:
            raise UserError(
                f"batch norm: {input.shape[0]} clips cannot be cut into {self.groups} equal groups; "
                "make the (micro-)batch of every rank a multiple of its number of groups"
            )
        ranks = 1
        if alone:
            # With momentum 1, running statistics become the batch's own.
            mean, var = torch.zeros((2, self.num_features), dtype=_stats_dtype(input), device=input.device)
            output = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
            mean, var = mean[None], var[None]
        elif self.process_group is None:
            output, mean, var = _GroupNormalise.apply(input, self.weight, self.bias, self.groups, self.eps)
        else:
            ranks = dist.get_world_size(self.process_group)
            output, mean, var = _SharedNormalise.apply(
                input, self.weight, self.bias, self.groups, self.eps, self.process_group
            )
        if self.pending is not None:
            self.pending.add_(_sums(mean, var, ranks))
        elif self.track_running_stats:
            _update_running([self], _sums(mean, var, ranks))
        return output


def convert_group_batchnorm(model: nn.Module) -> nn.Module:
    """Turns every plain `nn.BatchNorm3d` of a model into a `GroupBatchNorm3d`, in place, and returns the model.

    The modules, their parameters, buffers and hooks stay the very same objects.
    """
    for module in model.modules():
        if type(module) is nn.BatchNorm3d:
            module.__class__ = GroupBatchNorm3d
    return model


def set_bn_groups(model: nn.Module, groups: int, process_group: dist.ProcessGroup | None = None) -> None:
    """From now on, training cuts each batch into `groups` runs, each shared with the ranks of `process_group`."""
    if groups < 1:
        raise UserError(f"batch norm: {groups} groups of clips; there must be at least 1")
    if process_group is not None and dist.get_world_size(process_group) == 1:
        process_group = None
    for module in _layers(model):
        module.groups, module.process_group = groups, process_group


@contextmanager
def deferred_running_stats(model: nn.Module, world_group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Makes all training forwards inside it one update of the running statistics, over all ranks.

    Forwards accumulate on the device; on leaving, one all-reduce (over `world_group`, by default every rank; none
    without torch.distributed) covers all layers. After an exception the running statistics are as before.
    """
    layers = [layer for layer in _layers(model) if layer.training and layer.track_running_stats]
    for layer in layers:
        layer.pending = torch.zeros((4, layer.num_features), dtype=torch.float64, device=layer.running_mean.device)
    try:
        yield
        if layers:
            sums = torch.cat([layer.pending for layer in layers if layer.pending is not None], dim=1)
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums, group=world_group)
            _update_running(layers, sums)
    finally:
        for layer in layers:
            layer.pending = None


def _layers(model: nn.Module) -> list[GroupBatchNorm3d]:
    return [module for module in model.modules() if isinstance(module, GroupBatchNorm3d)]


def _stats_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sums(mean: Tensor, var: Tensor, ranks: int) -> Tensor:
    """Sums over groups of mean, mean², variance and 1, from `[groups, channels]` to float64 `[4, channels]`.

    Each of the `ranks` that share a group counts its part of it. In float64 a mean of squares may lose the square of
    the mean and still be precise.
    """
    mean, var = mean.double(), var.double()
    return torch.stack((mean, mean.square(), var, torch.ones_like(mean))).sum(1) / ranks


@torch.no_grad()
def _update_running(layers: Sequence[GroupBatchNorm3d], sums: Tensor) -> None:
    """Moves running statistics to the mean of means, and to the mean of variances plus the variance of means.

    `sums` holds the layers' `_sums` side by side. A layer that no group went through keeps its statistics.
    """
    count = sums[3]
    ran = count > 0
    mean, square, var = sums[:3] / torch.where(ran, count, 1)
    var = var + (square - mean.square())
    channels = [layer.num_features for layer in layers]
    for layer, m, v, r in zip(layers, mean.split(channels), var.split(channels), ran.split(channels), strict=True):
        layer.num_batches_tracked.add_(r[0])
        dtype = layer.running_mean.dtype
        # Without a momentum, torch keeps the plain average of all updates.
        factor = 1 / layer.num_batches_tracked.clamp(min=1) if layer.momentum is None else layer.momentum
        weight = r.to(dtype) * factor
        layer.running_mean.lerp_(m.to(dtype), weight)
        layer.running_var.lerp_(v.to(dtype), weight)


def _dense(x: Tensor, like: Tensor) -> Tensor:
    """x itself where it is channels_last_3d or contiguous as `like` is, or a copy: the CPU kernels need one layout."""
    last = like.is_contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)


class _GroupNormalise(torch.autograd.Function):
    """Groups within one rank: torch's kernels, group by group, into one output.

    Returns the output, and the groups' means and unbiased variances `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _dense(x, like=x)
        y = torch.empty_like(x)
        mean, invstd = x.new_empty((2, groups, x.shape[1]), dtype=_stats_dtype(x)).unbind()
        for x_i, y_i, mean_i, invstd_i in zip(x.chunk(groups), y.chunk(groups), mean, invstd, strict=True):
            aten._native_batch_norm_legit.no_stats_out(
                x_i, weight, bias, True, 0.0, eps, out=y_i, save_mean=mean_i, save_invstd=invstd_i
            )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        size = x.numel() // mean.numel()
        var = (invstd.double().pow(-2) - eps).clamp(min=0) * (size / (size - 1))
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        dy = _dense(dy, like=x)
        groups, affine = len(mean), weight is not None
        dx = torch.empty_like(x)
        dparams = []
        for x_i, dy_i, dx_i, mean_i, invstd_i in zip(
            x.chunk(groups), dy.chunk(groups), dx.chunk(groups), mean, invstd, strict=True
        ):
            gradient, *dparam = aten.native_batch_norm_backward(
                dy_i, x_i, weight, None, None, mean_i, invstd_i, True, ctx.eps, (True, affine, affine)
            )
            dx_i.copy_(gradient)
            dparams.append(dparam)
        if not affine:
            return dx, None, None, None, None
        dweight, dbias = (torch.stack(grads).sum(0) for grads in zip(*dparams, strict=True))
        return dx, dweight, dbias, None, None


class _SharedNormalise(torch.autograd.Function):
    """Groups spread over ranks: as `_GroupNormalise`, with one collective forward and one backward.

    A rank's i-th run is its part of group i; the means and variances returned are those of whole groups.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        process_group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _dense(x, like=x)
        dtype = _stats_dtype(x)
        # The kernel's precision is that of the running statistics it is given; momentum 0 leaves them as they are.
        zeros = x.new_zeros(x.shape[1], dtype=dtype)
        parts = [torch.batch_norm_update_stats(x_i, zeros, zeros, 0.0) for x_i in x.chunk(groups)]
        mean, var, size = _merge(parts, x.numel() // (groups * x.shape[1]), process_group)
        unbiased = var * (size / (size - 1))
        mean, var = mean.to(dtype), var.to(dtype)
        y = torch.empty_like(x)
        for x_i, y_i, mean_i, var_i in zip(x.chunk(groups), y.chunk(groups), mean, var, strict=True):
            _affine(x_i, mean_i, var_i, eps, weight, bias, out=y_i)
        ctx.save_for_backward(x, weight, mean, var, size)
        ctx.eps, ctx.process_group = eps, process_group
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, size = ctx.saved_tensors
        dy = _dense(dy, like=x)
        groups = len(mean)
        invstd = (var + ctx.eps).rsqrt()
        zero, one = torch.zeros_like(mean[0]), torch.ones_like(mean[0])
        gain = one if weight is None else weight
        sums = torch.empty((2, *mean.shape), dtype=mean.dtype, device=x.device)  # of dy·x̂ and of dy, per group
        for i, (x_i, dy_i) in enumerate(zip(x.chunk(groups), dy.chunk(groups), strict=True)):
            _, sums[0, i], sums[1, i] = aten.native_batch_norm_backward(
                dy_i, x_i, gain, None, None, mean[i], invstd[i], True, ctx.eps, (False, True, True)
            )
        dweight, dbias = sums.sum(1)
        dist.all_reduce(sums, group=ctx.process_group)
        # dx = scale · (dy − x̂ · mean(dy·x̂) − mean(dy)): an affine map of dy and one of x̂.
        scale = invstd * gain
        slope, offset = (-scale * sums / size).to(mean.dtype)
        dx = torch.empty_like(x)
        for i, (x_i, dy_i, dx_i) in enumerate(zip(x.chunk(groups), dy.chunk(groups), dx.chunk(groups), strict=True)):
            _affine(dy_i, zero, one, 0.0, scale[i], offset[i], out=dx_i)
            dx_i += _affine(x_i, mean[i], var[i], ctx.eps, slope[i], zero, out=torch.empty_like(x_i))
        if weight is None:
            dweight = dbias = None
        return dx, dweight, dbias, None, None, None


def _merge(parts: list[tuple[Tensor, Tensor]], size: int, process_group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """Mean, variance and size of groups, float64 `[groups, channels]`, from (mean, variance) of this rank's parts.

    `size` is the number of values per channel in a part of this rank. Variances are biased, and merged around the
    common mean (Chan, Golub and LeVeque 1979).
    """
    mean, var = (torch.stack(values).double() for values in zip(*parts, strict=True))
    mine = torch.stack((mean, var, torch.full_like(mean, size)))
    ranks = dist.get_world_size(process_group)
    gathered = mine.new_empty(ranks * mine.numel())
    dist.all_gather_into_tensor(gathered, mine.flatten(), group=process_group)
    means, variances, sizes = gathered.view(ranks, *mine.shape).unbind(1)
    total = sizes.sum(0)
    mean = (sizes * means).sum(0) / total
    var = (sizes * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def _affine(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, out: Tensor
) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias in one pass, in x's dtype and memory format."""
    unused = torch.empty_like(mean), torch.empty_like(mean)
    aten.native_batch_norm.out(
        x, weight, bias, mean, var, False, 0.0, eps, out=out, save_mean=unused[0], save_invstd=unused[1]
    )
    return out
