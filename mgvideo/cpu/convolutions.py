"""3-D convolutions on CPUs in bf16, computed as 2-D convolutions or matrix products.

This works for kernels of size 1 in time or in space, and for stems, as a 2-D convolution over frames stacked as
channels. torch's own 3-D kernels (oneDNN's, up to at least torch 2.15) are slower. In bf16 they also hang in the weight
gradient of some shapes, such as 320 → 512 channels on 2 × 40² at stride (1, 2, 2), and read uninitialised memory in
others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_STACKED_CHANNELS = 3  # stack frames as channels up to this number of input channels
MIN_MATMUL_CHANNELS = 16  # below this number of input channels, a 2-D convolution is faster than a matrix product
MIN_SHARED_ROW_CHANNELS = 64  # from this number of input channels on, rearranging small maps is worth the copies
MIN_CONTIGUOUS_WEIGHT_ROWS = 512  # from this number of rows on, copying the weight costs little beside the product
# The kernels process 16 positions of a row at once. Images with output rows narrower than the first number are put side
# by side, until a row is as wide as the second.
MIN_SINGLE_ROW_WIDTH, SHARED_ROW_WIDTH = 8, 64


class CpuConv3d(nn.Conv3d):
    """`nn.Conv3d` whose kernel has size 1 in time or in space, or few input channels; same parameters and results.

    Outside of autocast on a CPU it runs `nn.Conv3d` itself.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[n, channels, t, h, w]`. channels_last_3d is fastest, and the output then has it too."""
        if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        assert not isinstance(self.padding, str)  # such convolutions are not converted
        frames, *spatial_kernel = self.kernel_size
        stride_t, *stride = self.stride
        padding_t, *padding = self.padding
        # Slicing's gradient is a zero tensor in the order of dimensions, so move channels last before slicing.
        x = input.movedim(1, -1)
        if frames > 1 and self.in_channels <= MAX_STACKED_CHANNELS:
            # Stack each frame's neighbours as channels: three channels alone use a fraction of the CPU's vector width.
            x = x.to(torch.get_autocast_dtype("cpu"))
            x = F.pad(x, (0, 0) * 3 + (padding_t, padding_t)).unfold(1, frames, stride_t)
            y = _conv2d(x.flatten(0, 1).flatten(3), self.weight.flatten(1, 2), self.bias, stride, padding)
            y = y.unflatten(0, x.shape[:2])
        elif frames > 1:
            x = x[:, :, :: stride[0], :: stride[1]]
            y = _temporal_conv(x.flatten(2, 3), self.weight.squeeze(-1), self.bias, stride_t, padding_t)
            y = y.unflatten(2, x.shape[2:4])
        elif spatial_kernel == [1, 1] and self.in_channels >= MIN_MATMUL_CHANNELS:
            y = F.linear(x[:, ::stride_t, :: stride[0], :: stride[1]], self.weight.flatten(1), self.bias)
        else:
            x = x[:, ::stride_t]
            y = _conv2d(x.flatten(0, 1), self.weight.squeeze(2), self.bias, stride, padding)
            y = y.unflatten(0, x.shape[:2])
        return y.movedim(-1, 1)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Convolve `[n, h, w, channels]` to `[n, h', w', channels']`, narrow images several to a row."""
    images, _, width, channels = x.shape
    out_width = (width - 1) // stride[1] + 1
    keeps_width = weight.shape[3] == 2 * padding[1] + 1
    share_rows = out_width < MIN_SINGLE_ROW_WIDTH and channels >= MIN_SHARED_ROW_CHANNELS and keeps_width
    if share_rows:
        # Zeros between the images replace the padding; an image starts at a multiple of the stride.
        pitch = -(-(width + padding[1]) // stride[1]) * stride[1]
        per_row = next(
            n for n in range(1, images + 1) if images % n == 0 and (n * pitch >= SHARED_ROW_WIDTH or n == images)
        )
        x = F.pad(x.unflatten(0, (-1, per_row)).transpose(1, 2), (0, 0, 0, pitch - width)).flatten(2, 3)
    y = F.conv2d(x.movedim(-1, 1), weight, bias, stride, padding).movedim(1, -1)
    if share_rows:
        y = y.unflatten(2, (per_row, -1))[:, :, :, :out_width].transpose(1, 2).contiguous().flatten(0, 1)
    return y


def _temporal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Convolve `[n, t, positions, channels]` over time to `[n, t', positions, channels']`."""
    clips, frames, positions, channels = x.shape
    # whether each output frame depends on every input frame
    all_to_all = stride == 1 and frames <= padding + 1 and weight.shape[2] == 2 * padding + 1
    if not all_to_all or channels < MIN_SHARED_ROW_CHANNELS or clips * positions < MIN_CONTIGUOUS_WEIGHT_ROWS:
        return _conv2d(x, weight, bias, (stride, 1), (padding, 0))
    # one matrix product over the channels of all frames
    taps = weight.squeeze(3).transpose(1, 2).to(torch.get_autocast_dtype("cpu"))
    taps = torch.stack([taps[:, padding - i : padding - i + frames] for i in range(frames)])
    y = F.linear(x.transpose(1, 2).flatten(2), taps.flatten(2).flatten(0, 1))
    y = y.unflatten(2, (frames, -1)).transpose(1, 2).contiguous()
    return y if bias is None else y + bias.to(y.dtype)


class CpuDepthwiseConv3d(nn.Conv3d):
    """`nn.Conv3d` of each channel by itself, in any precision; same parameters and results.

    torch's kernels for it are fast in channels_last_3d only: of contiguous clips, forward and backward take 1.9 to 3.4
    times as long (docs/benchmarks/speed.md). In bf16, torch 2.15's weight gradients read uninitialised memory, so under
    autocast it computes in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[n, channels, t, h, w]`, on a CPU in channels_last_3d, which the output then has."""
        if input.device.type != "cpu":
            return super().forward(input)
        input = input.contiguous(memory_format=torch.channels_last_3d)
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            output = super().forward(input.float())
        return output.to(torch.get_autocast_dtype("cpu"))


def convert_convolutions(model: nn.Module) -> nn.Module:
    """Turn each `nn.Conv3d` that has a faster CPU version into it, in place, and return the model.

    The modules, their parameters and hooks stay the same objects.
    """
    for module in model.modules():
        if type(module) is nn.Conv3d and _is_convertible(module):
            module.__class__ = CpuConv3d
        elif type(module) is nn.Conv3d and module.groups == module.in_channels > 1:
            module.__class__ = CpuDepthwiseConv3d
    return model


def _is_convertible(conv: nn.Conv3d) -> bool:
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding_mode == "zeros"
    if not plain or isinstance(conv.padding, str):
        return False
    # with fewer than 8 output channels, stacking the frames costs more than it saves
    if conv.in_channels <= MAX_STACKED_CHANNELS and conv.out_channels >= 8:
        return True
    kernel = list(zip(conv.kernel_size, conv.padding, strict=True))  # (size, padding) of each dimension
    return kernel[0] == (1, 0) or (conv.kernel_size[0] > 1 and kernel[1:] == [(1, 0), (1, 0)])
