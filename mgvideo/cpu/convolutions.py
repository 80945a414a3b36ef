"""Convolutions that are flat in time or in space, as the 2-D ones and matrix products that they are, and stems as 2-D
ones over stacked frames.

For CPUs in bf16: torch's 3-D kernels there (oneDNN's, as late as torch 2.15) wait for ever in the weight gradient of
some shapes, such as 320 → 512 channels of 2 × 40² at stride (1, 2, 2), read memory that nobody wrote in others, and
are slower than these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_STACKED_CHANNELS = 3  # input channels up to which frames are stacked
MIN_MATMUL_CHANNELS = 16  # input channels below which a 2-D convolution is faster than a matrix product
MIN_SHARED_ROW_CHANNELS = 64  # input channels from which on rearranging small maps is worth its copies
MIN_CONTIGUOUS_WEIGHT_ROWS = 512  # rows of a matrix product from which on a copy of its weight is small beside it
NARROW, WIDE = 8, 64  # kernels take 16 positions of a row at once: images share rows of WIDE where theirs are narrow


class CpuConv3d(nn.Conv3d):
    """`nn.Conv3d` with a kernel of one frame, of one position, or over few channels; parameters and results are the
    same."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolves `[n, channels, t, h, w]`, best in channels_last_3d, which its result then has."""
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        assert not isinstance(self.padding, str)  # never of a converted one
        (frames, *square), (pace, *stride), (border, *padding) = self.kernel_size, self.stride, self.padding
        # with channels last before anything is left out, since its gradient gets zeros in the order of dimensions
        x = input.movedim(1, -1)
        if frames > 1 and self.in_channels <= MAX_STACKED_CHANNELS:
            # a frame with its neighbours as more channels: three are far from what such a CPU takes at once
            x = F.pad(x.to(torch.get_autocast_dtype("cpu")), (0, 0) * 3 + (border, border)).unfold(1, frames, pace)
            y = _conv2d(x.flatten(0, 1).flatten(3), self.weight.flatten(1, 2), self.bias, stride, padding)
            y = y.unflatten(0, x.shape[:2])
        elif frames > 1:
            x = x[:, :, :: stride[0], :: stride[1]]
            y = _temporal(x.flatten(2, 3), self.weight.squeeze(-1), self.bias, pace, border)
            y = y.unflatten(2, x.shape[2:4])
        elif square == [1, 1] and self.in_channels >= MIN_MATMUL_CHANNELS:
            y = F.linear(x[:, ::pace, :: stride[0], :: stride[1]], self.weight.flatten(1), self.bias)
        else:
            x = x[:, ::pace]
            y = _conv2d(x.flatten(0, 1), self.weight.squeeze(2), self.bias, stride, padding)
            y = y.unflatten(0, x.shape[:2])
        return y.movedim(-1, 1)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """`[n, h, w, channels]` → `[n, h', w', channels']`."""
    images, _, width, channels = x.shape
    kept = (width - 1) // stride[1] + 1
    narrow = kept < NARROW and channels >= MIN_SHARED_ROW_CHANNELS and weight.shape[3] == 2 * padding[1] + 1
    if narrow:  # images side by side
        pace = -(-(width + padding[1]) // stride[1]) * stride[1]  # from one image to the next, zeros between them
        row = next(n for n in range(1, images + 1) if images % n == 0 and (n * pace >= WIDE or n == images))
        x = F.pad(x.unflatten(0, (-1, row)).transpose(1, 2), (0, 0, 0, pace - width)).flatten(2, 3)
    y = F.conv2d(x.movedim(-1, 1), weight, bias, stride, padding).movedim(1, -1)
    if narrow:
        y = y.unflatten(2, (row, -1))[:, :, :, :kept].transpose(1, 2).contiguous().flatten(0, 1)
    return y


def _temporal(x: Tensor, weight: Tensor, bias: Tensor | None, pace: int, border: int) -> Tensor:
    """`[n, t, positions, channels]` → `[n, t', positions, channels']`."""
    clips, frames, positions, channels = x.shape
    each_meets_all = pace == 1 and frames <= border + 1 and weight.shape[2] == 2 * border + 1
    if not each_meets_all or channels < MIN_SHARED_ROW_CHANNELS or clips * positions < MIN_CONTIGUOUS_WEIGHT_ROWS:
        return _conv2d(x, weight, bias, (pace, 1), (border, 0))
    # a matrix product of all frames' channels
    taps = weight.squeeze(3).transpose(1, 2).to(torch.get_autocast_dtype("cpu"))
    taps = torch.stack([taps[:, border - i : border - i + frames] for i in range(frames)])
    y = F.linear(x.transpose(1, 2).flatten(2), taps.flatten(2).flatten(0, 1))
    y = y.unflatten(2, (frames, -1)).transpose(1, 2).contiguous()
    return y if bias is None else y + bias.to(y.dtype)


def convert_convolutions(model: nn.Module) -> nn.Module:
    """Turns every plain `nn.Conv3d` with such a kernel into a `FlatConv3d`, in place, and returns the model.

    The modules, their parameters and hooks stay the very same objects.
    """
    for module in model.modules():
        if type(module) is nn.Conv3d and _converts(module):
            module.__class__ = CpuConv3d
    return model


def _converts(conv: nn.Conv3d) -> bool:
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        return False
    if conv.in_channels <= MAX_STACKED_CHANNELS and conv.out_channels >= 8:  # fewer cost less than the copy
        return True
    kernel = list(zip(conv.kernel_size, conv.padding, strict=True))
    return kernel[0] == (1, 0) or (conv.kernel_size[0] > 1 and kernel[1:] == [(1, 0), (1, 0)])
