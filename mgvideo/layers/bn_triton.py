"""Triton kernels that normalise groups of clips on a GPU: two passes over the data in forward, two in backward.

They read channels_last tensors as a matrix `[groups · rows, channels]`: the clips of a group are consecutive rows. All
arithmetic is in float32. Each sum is taken over a fixed partition of the rows, so results are deterministic.
"""
# mypy: disable-error-code="no-untyped-def"
# Triton compiles the kernels for the types that it is called with: pointers, numbers and compile-time constants.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgvideo.cpu.batchnorm import make_dense

ROWS, WIDE, NARROW = 64, 64, 16  # of a tile: rows, and channels of layers with at least 64 and with fewer channels
SPLITS = 32  # of a tile of the kernels that merge the splits of a group
PROGRAMS = 1024  # that share the rows of a reduction; a GPU has about 100 multiprocessors
# values that differ from layer to layer; kernels specialised for them would be compiled again and again
VARYING = ("rows", "rows_per_split", "splits")


class TritonGroupNormalise(torch.autograd.Function):
    """Normalises groups within one rank. `can_normalise` says for which tensors.

    Returns the output, and the groups' means and inverse standard deviations, float32 `[groups, channels]`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x, `[n, channels, t · h, w]` in channels_last."""
        tiles = _Tiles(x, groups)
        mean, invstd, scale, shift = x.new_empty((4, groups, tiles.channels), dtype=torch.float32)
        partial = x.new_empty((2, groups, tiles.splits, tiles.channels), dtype=torch.float32)
        y = torch.empty_like(x)
        _partial_statistics[tiles.reduction](x, *partial, *tiles.sizes, **tiles.tile)
        _finish_statistics[tiles.channel_blocks, groups](
            *partial, weight, bias, mean, invstd, scale, shift, *tiles.sizes, tiles.splits, eps, **tiles.split_tile
        )
        _apply[tiles.elementwise](x, y, scale, shift, *tiles.sizes[:2], **tiles.tile)
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
        groups = len(mean)
        tiles, dy = _Tiles(x, groups), make_dense(dy, like=x)
        partial = x.new_empty((2, groups, tiles.splits, tiles.channels), dtype=torch.float32)
        slope, offset = x.new_empty((2, groups, tiles.channels), dtype=torch.float32)
        affine = x.new_empty((2, groups, tiles.channels), dtype=torch.float32)  # gradients of weight and bias
        dx = torch.empty_like(x)
        _partial_gradient_sums[tiles.reduction](x, dy, mean, *partial, *tiles.sizes, **tiles.tile)
        _finish_gradient_sums[tiles.channel_blocks, groups](
            *partial, mean, invstd, scale, slope, offset, *affine, *tiles.sizes[:2], tiles.splits, **tiles.split_tile
        )
        _apply_gradient[tiles.elementwise](x, dy, dx, scale, slope, offset, *tiles.sizes[:2], **tiles.tile)
        dweight, dbias = affine.sum(1) if ctx.affine else (None, None)
        return dx, dweight, dbias, None, None


class _Tiles:
    """How the kernels divide a tensor: launch grids and tile sizes."""

    def __init__(self, x: Tensor, groups: int) -> None:
        n, self.channels, height, width = x.shape
        self.rows = n // groups * height * width  # of a group
        self.block = WIDE if self.channels >= WIDE else NARROW
        block_rows = ROWS * (WIDE // self.block)
        self.channel_blocks = triton.cdiv(self.channels, self.block)
        row_blocks = triton.cdiv(self.rows, block_rows)
        splits = max(1, min(row_blocks, PROGRAMS // (groups * self.channel_blocks)))
        rows_per_split = triton.cdiv(row_blocks, splits) * block_rows
        self.splits = triton.cdiv(self.rows, rows_per_split)
        self.sizes = (self.rows, self.channels, rows_per_split)
        self.tile = {"block_rows": block_rows, "block": self.block}
        self.split_tile = {"block_splits": SPLITS, "block": self.block}
        # The number of row blocks comes first: CUDA limits the second and third number of a launch grid to 65,535.
        self.reduction = (self.splits, self.channel_blocks, groups)
        self.elementwise = (row_blocks, self.channel_blocks, groups)


def can_normalise(x: Tensor, groups: int) -> bool:
    """Whether the kernels accept x, `[n, channels, t · h, w]`: channels_last in float32, bf16 or fp16."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return x.dtype in dtypes and x.is_contiguous(memory_format=torch.channels_last) and groups <= 65535


@triton.jit(do_not_specialize=VARYING)
def _partial_statistics(
    x_ptr, mean_ptr, m2_ptr, rows, channels, rows_per_split, block_rows: tl.constexpr, block: tl.constexpr
):
    """Mean and sum of squared deviations of one split of a group's rows, from deviations from its first rows' mean."""
    split, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    row = first + tl.arange(0, block_rows)
    mask = (row < last)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + (group * rows + row)[:, None] * channels + channel[None, :], mask, 0.0).to(tl.float32)
    pivot = tl.sum(x, 0) / tl.minimum(block_rows, last - first).to(tl.float32)
    sums = tl.zeros((block_rows, block), tl.float32)
    squares = tl.zeros((block_rows, block), tl.float32)
    for start in range(first, last, block_rows):
        row = start + tl.arange(0, block_rows)
        mask = (row < last)[:, None] & (channel < channels)[None, :]
        x = tl.load(x_ptr + (group * rows + row)[:, None] * channels + channel[None, :], mask, 0.0).to(tl.float32)
        deviation = tl.where(mask, x - pivot[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    mean_deviation = tl.sum(sums, 0) / (last - first).to(tl.float32)
    mean = pivot + mean_deviation
    m2 = tl.sum(squares, 0) - mean_deviation * mean_deviation * (last - first).to(tl.float32)
    out = (group * tl.num_programs(0) + split) * channels + channel
    tl.store(mean_ptr + out, mean, channel < channels)
    tl.store(m2_ptr + out, m2, channel < channels)


@triton.jit(do_not_specialize=VARYING)
def _finish_statistics(
    part_mean_ptr, part_m2_ptr, weight_ptr, bias_ptr, mean_ptr, invstd_ptr, scale_ptr, shift_ptr,
    rows, channels, rows_per_split, splits, eps, block_splits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Merge the splits of a group (Chan, Golub and LeVeque 1979), and compute the affine map that normalises it."""
    group = tl.program_id(1)
    channel = tl.program_id(0) * block + tl.arange(0, block)
    inside = channel < channels
    mean = tl.zeros((block,), tl.float32)
    for start in range(0, splits, block_splits):
        split = start + tl.arange(0, block_splits)
        mask = (split < splits)[:, None] & inside[None, :]
        part = (group * splits + split)[:, None] * channels + channel[None, :]
        share = tl.minimum(rows_per_split, rows - split * rows_per_split).to(tl.float32) / rows
        mean += tl.sum(tl.load(part_mean_ptr + part, mask, 0.0) * share[:, None], 0)
    var = tl.zeros((block,), tl.float32)
    for start in range(0, splits, block_splits):
        split = start + tl.arange(0, block_splits)
        mask = (split < splits)[:, None] & inside[None, :]
        part = (group * splits + split)[:, None] * channels + channel[None, :]
        share = tl.minimum(rows_per_split, rows - split * rows_per_split).to(tl.float32) / rows
        deviation = tl.where(mask, tl.load(part_mean_ptr + part, mask, 0.0) - mean[None, :], 0.0)
        var += tl.sum(tl.load(part_m2_ptr + part, mask, 0.0) / rows + deviation * deviation * share[:, None], 0)
    invstd = 1.0 / tl.sqrt(tl.maximum(var, 0.0) + eps)
    scale, shift = invstd, -mean * invstd
    if weight_ptr is not None:
        scale = invstd * tl.load(weight_ptr + channel, inside, 0.0).to(tl.float32)
        shift = -mean * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)
    out = group * channels + channel
    tl.store(mean_ptr + out, mean, inside)
    tl.store(invstd_ptr + out, invstd, inside)
    tl.store(scale_ptr + out, scale, inside)
    tl.store(shift_ptr + out, shift, inside)


@triton.jit(do_not_specialize=VARYING)
def _apply(x_ptr, y_ptr, scale_ptr, shift_ptr, rows, channels, block_rows: tl.constexpr, block: tl.constexpr):
    """Compute y = x · scale + shift with the scale and shift of each group."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < channels
    mask = (row < rows)[:, None] & inside[None, :]
    at = (group * rows + row)[:, None] * channels + channel[None, :]
    scale = tl.load(scale_ptr + group * channels + channel, inside, 0.0)
    shift = tl.load(shift_ptr + group * channels + channel, inside, 0.0)
    y = tl.load(x_ptr + at, mask, 0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=VARYING)
def _partial_gradient_sums(
    x_ptr, dy_ptr, mean_ptr, sum_dy_ptr, sum_dyx_ptr, rows, channels, rows_per_split,
    block_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy · (x − mean) over one split of a group's rows."""
    split, group = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < channels
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, rows)
    mean = tl.load(mean_ptr + group * channels + channel, inside, 0.0)
    sum_dy = tl.zeros((block_rows, block), tl.float32)
    sum_dyx = tl.zeros((block_rows, block), tl.float32)
    for start in range(first, last, block_rows):
        row = start + tl.arange(0, block_rows)
        mask = (row < last)[:, None] & inside[None, :]
        at = (group * rows + row)[:, None] * channels + channel[None, :]
        dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        sum_dy += dy
        sum_dyx += dy * (x - mean[None, :])
    out = (group * tl.num_programs(0) + split) * channels + channel
    tl.store(sum_dy_ptr + out, tl.sum(sum_dy, 0), inside)
    tl.store(sum_dyx_ptr + out, tl.sum(sum_dyx, 0), inside)


@triton.jit(do_not_specialize=VARYING)
def _finish_gradient_sums(
    sum_dy_ptr, sum_dyx_ptr, mean_ptr, invstd_ptr, scale_ptr, slope_ptr, offset_ptr, dweight_ptr, dbias_ptr,
    rows, channels, splits, block_splits: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute a group's parts of the gradients of weight and bias, and its affine map of x in the gradient of x.

    dx = scale · (dy − mean(dy) − x̂ · mean(dy · x̂)) = scale · dy + slope · x + offset
    """
    group = tl.program_id(1)
    channel = tl.program_id(0) * block + tl.arange(0, block)
    inside = channel < channels
    sum_dy = tl.zeros((block,), tl.float32)
    sum_dyx = tl.zeros((block,), tl.float32)
    for start in range(0, splits, block_splits):
        split = start + tl.arange(0, block_splits)
        mask = (split < splits)[:, None] & inside[None, :]
        part = (group * splits + split)[:, None] * channels + channel[None, :]
        sum_dy += tl.sum(tl.load(sum_dy_ptr + part, mask, 0.0), 0)
        sum_dyx += tl.sum(tl.load(sum_dyx_ptr + part, mask, 0.0), 0)
    at = group * channels + channel
    mean, invstd = tl.load(mean_ptr + at, inside, 0.0), tl.load(invstd_ptr + at, inside, 0.0)
    scale = tl.load(scale_ptr + at, inside, 0.0)
    sum_dy_xhat = sum_dyx * invstd
    slope = -scale * invstd * sum_dy_xhat / rows
    tl.store(slope_ptr + at, slope, inside)
    tl.store(offset_ptr + at, -scale * sum_dy / rows - slope * mean, inside)
    tl.store(dweight_ptr + at, sum_dy_xhat, inside)
    tl.store(dbias_ptr + at, sum_dy, inside)


@triton.jit(do_not_specialize=VARYING)
def _apply_gradient(
    x_ptr, dy_ptr, dx_ptr, scale_ptr, slope_ptr, offset_ptr, rows, channels,
    block_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute dx = dy · scale + x · slope + offset with the values of each group."""
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < channels
    mask = (row < rows)[:, None] & inside[None, :]
    at = (group * rows + row)[:, None] * channels + channel[None, :]
    per_group = group * channels + channel
    scale = tl.load(scale_ptr + per_group, inside, 0.0)
    slope = tl.load(slope_ptr + per_group, inside, 0.0)
    offset = tl.load(offset_ptr + per_group, inside, 0.0)
    dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
    dx = dy * scale[None, :] + x * slope[None, :] + offset[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask)
