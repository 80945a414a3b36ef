"""Kernels that normalise groups of clips: within one rank on a GPU, and over several ranks on any device."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgvideo.cpu.batchnorm import CpuGroupNormalise, make_dense, repeat_channels, split_groups, stats_dtype

aten = torch.ops.aten


def choose_kernels(x: Tensor, groups: int) -> type[torch.autograd.Function]:
    """Return the fastest kernels that normalise groups within one rank of x, `[n, channels, t · h, w]`.

    On a GPU those in Triton, where it is installed and x is channels_last; torch.compile makes its own from the others.
    """
    if x.device.type == "cpu":
        return CpuGroupNormalise
    if x.device.type == "cuda" and not torch.compiler.is_compiling() and _has_triton(x.device.index):
        from .bn_triton import TritonGroupNormalise, can_normalise

        if can_normalise(x, groups):
            return TritonGroupNormalise
    return GpuGroupNormalise


@cache
def _has_triton(device: int) -> bool:
    """Whether Triton is installed and supports the GPU: capability 7.0 or newer."""
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


class GpuGroupNormalise(torch.autograd.Function):
    """Normalises groups within one rank on any device with torch's operations, each of which covers all groups.

    Returns the output, and the groups' means and inverse standard deviations `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x, `[n, channels, t · h, w]`."""
        x = make_dense(x, like=x)
        clips = _by_group(x, groups)
        # Both reductions read bf16 or fp16 directly and accumulate in float32.
        mean = clips.mean((1, 3), dtype=stats_dtype(x))
        var = torch.var(clips, (1, 3), correction=0, out=torch.empty_like(mean))
        invstd = var.add_(eps).rsqrt_()
        scale = invstd if weight is None else invstd * weight
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        y = torch.empty_like(x)
        torch.addcmul(_per_channel(shift), clips, _per_channel(scale), out=_by_group(y, groups))
        ctx.save_for_backward(x, mean, invstd, scale)
        ctx.affine = weight is not None
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # otherwise autograd allocates zero gradients for these two
        return y, mean, invstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; None for those without one."""
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, mean, invstd, scale = ctx.saved_tensors
        clips, gradients = _by_group(x, len(mean)), _by_group(make_dense(dy, like=x), len(mean))
        per_value = mean.numel() / x.numel()  # 1 / number of values of a group in a channel
        sum_dy = gradients.sum((1, 3), dtype=mean.dtype)
        # The float32 offset makes the products float32 too: rounded to bf16, they would add up to noise.
        centre = (mean * sum_dy).mul_(-per_value)
        sum_dy_xhat = torch.addcmul(_per_channel(centre), clips, gradients).sum((1, 3)).mul_(invstd)
        # dx = scale · (dy − mean(dy) − x̂ · mean(dy · x̂)): scale · dy plus an affine map of x
        mean_scale = scale * -per_value
        slope = mean_scale * invstd * sum_dy_xhat
        offset = torch.addcmul(mean_scale * sum_dy, slope, mean, value=-1)
        dx = torch.empty_like(x)
        dclips = _by_group(dx, len(mean))
        torch.addcmul(_per_channel(offset), clips, _per_channel(slope), out=dclips)
        torch.addcmul(dclips, gradients, _per_channel(scale), out=dclips)
        if not ctx.affine:
            return dx, None, None, None, None
        return dx, sum_dy_xhat.sum(0), sum_dy.sum(0), None, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Return the view `[groups, clips, channels, positions]` of a dense x."""
    return x.unflatten(0, (groups, -1)).flatten(3)


def _per_channel(values: Tensor) -> Tensor:
    """Reshape `[groups, channels]` so that it broadcasts against `_by_group`."""
    return values[:, None, :, None]


class MergedNormalise(torch.autograd.Function):
    """Normalises groups whose statistics are merged from parts: of several ranks, or of positions folded into channels.

    Runs one collective operation in forward and one in backward if there is a process group. `fold` is the number of
    positions folded into channels, 1 on a GPU: see mgvideo.cpu.batchnorm. Returns the output for this rank's part, and
    the means and unbiased variances of the whole groups, `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        fold: int,
        eps: float,
        process_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x, `[n, channels, t · h, w]`."""
        x, dtype = make_dense(x, like=x), stats_dtype(x)
        parts = split_groups(x, groups, fold)
        # The kernel computes in the dtype of the running statistics it gets; momentum 0 leaves these unchanged.
        zeros = x.new_zeros(fold * x.shape[1], dtype=dtype)
        stats = [torch.stack(torch.batch_norm_update_stats(part, zeros, zeros, 0.0)) for part in parts]
        means, variances = torch.stack(stats, 1).double().unflatten(2, (fold, -1))
        mean = means.mean(1)
        var = (variances + (means - mean[:, None]).square()).mean(1)
        mean, var, size = _merge(mean, var, x.numel() // mean.numel(), process_group)
        unbiased = var * (size / (size - 1))
        mean, var = mean.to(dtype), var.to(dtype)
        ctx.save_for_backward(x, weight, mean, var, size)
        ctx.fold, ctx.eps, ctx.process_group = fold, eps, process_group
        ctx.mark_non_differentiable(mean, unbiased)
        ctx.set_materialize_grads(False)
        y = torch.empty_like(x)
        weight, bias, mean_f, var_f = repeat_channels(fold, weight, bias, mean, var)
        for part, y_i, mean_i, var_i in zip(parts, split_groups(y, groups, fold), mean_f, var_f, strict=True):
            _affine(part, mean_i, var_i, eps, weight, bias, out=y_i)
        return y, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; None for those without one."""
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, mean, var, size = ctx.saved_tensors
        groups, fold = len(mean), ctx.fold
        gain = torch.ones_like(mean[0]) if weight is None else weight
        x_parts, dy_parts = (split_groups(tensor, groups, fold) for tensor in (x, make_dense(dy, like=x)))
        gain_f, mean_f, var_f = repeat_channels(fold, gain, mean, var)
        scaled, sums = [], []  # dy · scale; sums of dy·x̂ and of dy
        unused = mean.new_empty(0)  # saved statistics: CUDA's kernels require a tensor although they do not read it
        for x_i, dy_i, mean_i, var_i in zip(x_parts, dy_parts, mean_f, var_f, strict=True):
            gradient, *part_sums = aten.native_batch_norm_backward.default(
                dy_i, x_i, gain_f, mean_i, var_i, unused, unused, False, ctx.eps, (True, True, True)
            )
            scaled.append(gradient)
            sums.append(torch.stack(part_sums))
        rank_sums = torch.stack(sums, 1).unflatten(2, (fold, -1)).sum(2)
        group_sums = rank_sums.clone()
        if ctx.process_group is not None:
            dist.all_reduce(group_sums, group=ctx.process_group)
        # dx = scale · (dy − x̂ · mean(dy·x̂) − mean(dy)): scale · dy plus an affine map of x̂
        maps = repeat_channels(fold, *(-(var + ctx.eps).rsqrt() * gain * group_sums / size).to(mean.dtype))
        dx = torch.empty_like(x)
        for dx_i, x_i, scaled_i, mean_i, var_i, slope, offset in zip(
            split_groups(dx, groups, fold), x_parts, scaled, mean_f, var_f, *maps, strict=True
        ):
            _affine(x_i, mean_i, var_i, ctx.eps, slope, offset, out=dx_i).add_(scaled_i)
        dweight, dbias = rank_sums.sum(1) if weight is not None else (None, None)
        return dx, dweight, dbias, None, None, None, None


def _merge(
    mean: Tensor, var: Tensor, size: int, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge means, biased variances and sizes of the ranks' parts of groups, all float64 `[groups, channels]`.

    Sizes are numbers of values per channel. Variances merge around the common mean (Chan, Golub and LeVeque 1979).
    """
    part = torch.stack((mean, var, torch.full_like(mean, size)))
    if process_group is None:
        return part.unbind()  # type: ignore[return-value]
    ranks = dist.get_world_size(process_group)
    parts = part.new_empty(ranks * part.numel())
    dist.all_gather_into_tensor(parts, part.flatten(), group=process_group)
    means, variances, sizes = parts.view(ranks, *part.shape).unbind(1)
    total = sizes.sum(0)
    mean = (sizes * means).sum(0) / total
    var = (sizes * (variances + (means - mean).square())).sum(0) / total
    return mean, var, total


def _affine(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None, out: Tensor
) -> Tensor:
    """Compute (x − mean) / √(var + eps) · weight + bias in one pass, into `out` of x's dtype and memory format."""
    # CUDA's kernels write to these two, so they must not share memory.
    save_mean, save_invstd = mean.new_empty(0), mean.new_empty(0)
    return aten.native_batch_norm.out(
        x, weight, bias, mean, var, False, 0.0, eps, out=out, save_mean=save_mean, save_invstd=save_invstd
    )[0]
