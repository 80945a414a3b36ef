"""Convolutions for CPUs against those of torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tolerance import rounding_error
from torch import Tensor, nn

from mgvideo.cpu.convolutions import CpuConv3d, CpuDepthwiseConv3d, convert_convolutions
from mgvideo.engine.precision import cpu_has_bf16

pytestmark = pytest.mark.numeric

CONVERTIBLE = {
    "pointwise": nn.Conv3d(32, 24, 1, bias=False),
    "pointwise, strided": nn.Conv3d(32, 24, 1, (2, 2, 2)),
    "pointwise, few channels": nn.Conv3d(8, 24, 1, (1, 2, 2)),
    "spatial": nn.Conv3d(32, 24, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
    "spatial, every other frame": nn.Conv3d(3, 8, (1, 7, 5), (2, 2, 1), (0, 3, 2)),
    "stem": nn.Conv3d(3, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
    "stem, strided": nn.Conv3d(3, 8, (3, 5, 3), (2, 1, 2), (1, 0, 1)),
    "temporal": nn.Conv3d(32, 24, (3, 1, 1), 1, (1, 0, 0), bias=False),
    "temporal, strided": nn.Conv3d(16, 24, (5, 1, 1), (4, 2, 2), (2, 0, 0)),
}
NOT_CONVERTIBLE = {
    "cube": nn.Conv3d(4, 4, 3, padding=1),
    "grouped": nn.Conv3d(4, 4, (1, 3, 3), groups=2),
    "dilated": nn.Conv3d(4, 4, (3, 1, 1), dilation=(2, 1, 1)),
    "stem of few channels": nn.Conv3d(3, 4, (5, 7, 7), padding=(2, 3, 3)),
    "padded in time": nn.Conv3d(4, 4, 1, padding=(1, 0, 0)),
    "same": nn.Conv3d(4, 4, (1, 3, 3), padding="same"),
    "reflected": nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1), padding_mode="reflect"),
}


def results(conv: nn.Module, clips: Tensor, bf16: bool) -> list[Tensor]:
    """Return the output, and the gradients of the clips, the weight and the bias."""
    clips = clips.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = conv(clips)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    loss = (output.float() * gradient).sum()
    return [output, *torch.autograd.grad(loss, [clips, *conv.parameters()])]


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last_3d", "contiguous"])
def test_results_and_gradients_equal_those_of_a_3d_convolution(name: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    check(CONVERTIBLE[name], torch.randn(2, 6, 12, 10, CONVERTIBLE[name].in_channels), channels_last)


def check(conv: nn.Conv3d, frames: Tensor, channels_last: bool = True) -> None:
    """Compare a converted convolution of `frames`, `[n, t, h, w, channels]`, with torch's, in either memory format."""
    converted = convert_convolutions(copy.deepcopy(conv))
    assert type(converted) is CpuConv3d
    clips = frames.movedim(-1, 1)
    if not channels_last:
        clips = clips.contiguous()
    exact = results(conv, clips, bf16=False)
    # Additions in bf16: of the gradients of a frame that several outputs use. Without bf16 instructions, also of the
    # weight gradients of all images, and of the gradients of a pixel that several outputs use.
    terms = conv.kernel_size[0]
    if not cpu_has_bf16():
        terms = max(len(frames) * frames.shape[1], math.prod(conv.kernel_size))
    dtypes = [torch.bfloat16, *(torch.float32 for _ in exact[1:])]
    for actual, expected, dtype in zip(results(converted, clips, True), exact, dtypes, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == dtype
        assert (actual.float() - expected).norm() < rounding_error(torch.bfloat16, terms) * expected.norm()
    assert not channels_last or results(converted, clips, True)[0].is_contiguous(memory_format=torch.channels_last_3d)
    for actual, expected in zip(results(converted, clips, False), exact, strict=True):
        assert torch.equal(actual, expected), "in float32 torch's own convolution runs"


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_few_frames(frames: int) -> None:
    torch.manual_seed(0)
    check(nn.Conv3d(64, 24, (5, 1, 1), (1, 2, 1), (2, 0, 0)), torch.randn(32, frames, 9, 4, 64))


@pytest.mark.parametrize("width", [1, 4, 5, 7, 14])
@pytest.mark.parametrize("images", [1, 6, 13])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), (1, 1)), ((3, 5), (1, 2)), ((1, 3), (2, 3))])
def test_narrow_maps(width: int, images: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    padding = (0, kernel[0] // 2, kernel[1] // 2)
    check(nn.Conv3d(64, 24, (1, *kernel), (1, *stride), padding), torch.randn(images, 1, 5, width, 64))


@pytest.mark.parametrize("name", NOT_CONVERTIBLE)
def test_other_convolutions_stay_unchanged(name: str) -> None:
    assert type(convert_convolutions(copy.deepcopy(NOT_CONVERTIBLE[name]))) is nn.Conv3d


def test_depthwise_convolutions_run_in_channels_last_with_the_same_result() -> None:
    conv = nn.Conv3d(6, 6, 3, (1, 2, 2), 1, groups=6, bias=False)
    converted = convert_convolutions(copy.deepcopy(conv))
    assert type(converted) is CpuDepthwiseConv3d
    for clips in (torch.randn(2, 6, 4, 9, 8), torch.randn(2, 4, 9, 8, 6).movedim(-1, 1)):
        output = converted(clips)
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(output, conv(clips))


def test_depthwise_convolutions_compute_in_float32_under_autocast() -> None:
    """Their weight gradients in bf16 read uninitialised memory, which is NaN here."""
    conv = convert_convolutions(nn.Conv3d(16, 16, 3, (1, 2, 2), 1, groups=16, bias=False))
    clips = torch.randn(8, 2, 8, 8, 16).movedim(-1, 1)
    expected = torch.autograd.grad(conv(clips).sum(), conv.weight)
    for _ in range(20):
        for size in (10**4, 10**5, 10**6):
            torch.full((size,), float("nan"))
        with torch.autocast("cpu", torch.bfloat16):
            output = conv(clips.bfloat16())
        assert output.dtype is torch.bfloat16
        gradient = torch.autograd.grad(output.float().sum(), conv.weight)
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.2)
