"""Batch norm over groups of clips on a CPU: torch's kernels, group by group, on folded inputs if channels are few."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def stats_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which statistics of x are computed: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def make_dense(x: Tensor, like: Tensor) -> Tensor:
    """Return x, copied if needed, in channels_last if `like` is, otherwise contiguous: CPU kernels need one layout."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class CpuGroupNormalise(torch.autograd.Function):
    """Normalises groups within one rank on a CPU: runs torch's kernels group by group, into one output.

    Returns the output, and the groups' means and inverse standard deviations `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x, `[n, channels, t · h, w]`."""
        x = make_dense(x, like=x)
        y = torch.empty_like(x)
        mean = x.new_empty((groups, x.shape[1]), dtype=stats_dtype(x))
        invstd = torch.empty_like(mean)  # its own tensor: torch.compile of torch 2.11 cannot trace views here
        for x_i, y_i, mean_i, invstd_i in zip(x.chunk(groups), y.chunk(groups), mean, invstd, strict=True):
            aten._native_batch_norm_legit.no_stats_out(
                x_i, weight, bias, True, 0.0, eps, out=y_i, save_mean=mean_i, save_invstd=invstd_i
            )
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # otherwise autograd allocates zero gradients for these two
        return y, mean, invstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs; None for those without one."""
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, weight, mean, invstd = ctx.saved_tensors
        dy = make_dense(dy, like=x)
        groups, affine = len(mean), weight is not None
        dx = torch.empty_like(x)
        dweights, dbiases = [], []
        for x_i, dy_i, dx_i, mean_i, invstd_i in zip(
            x.chunk(groups), dy.chunk(groups), dx.chunk(groups), mean, invstd, strict=True
        ):
            gradient, dweight, dbias = aten.native_batch_norm_backward.default(
                dy_i, x_i, weight, None, None, mean_i, invstd_i, True, ctx.eps, (True, affine, affine)
            )
            dx_i.copy_(gradient)
            dweights.append(dweight)
            dbiases.append(dbias)
        if not affine:
            return dx, None, None, None, None
        return dx, torch.stack(dweights).sum(0), torch.stack(dbiases).sum(0), None, None


def fold_factor(x: Tensor, groups: int) -> int:
    """Return how many neighbouring positions to treat as extra channels, so that few channels fill a CPU's registers.

    On two cores, torch's channels_last kernels take 5 to 9 ns a value for 8 channels and 0.6 ns for 32 (bf16, forward
    and backward).
    """
    channels, values = x.shape[1], x.numel() // groups
    layout = x.is_contiguous(memory_format=torch.channels_last)
    if x.device.type != "cpu" or not layout or channels >= 16 or values < 2**14:
        return 1  # folding is not faster
    return math.gcd(32 // channels, values // channels)


def split_groups(x: Tensor, groups: int, fold: int) -> Sequence[Tensor]:
    """Return views of the groups of x: `[n / groups, channels, t · h, w]`; folded, `[1, fold · channels, …, 1]`."""
    if fold == 1:
        return x.chunk(groups)
    return x.movedim(1, -1).view(groups, 1, -1, 1, fold * x.shape[1]).movedim(-1, 2).unbind()


def repeat_channels(fold: int, *maps: Any) -> list[Any]:
    """Repeat values per channel `[…, channels]` for each position that is folded into channels; None stays None."""
    return [t if t is None or fold == 1 else t.repeat(*[1] * (t.dim() - 1), fold) for t in maps]
