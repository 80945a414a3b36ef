"""Every network trains on every grid of the published plans, and on odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import needs_bf16
from torch import nn
from zoo import NAMES, build, build_narrow

from mgvideo.cpu.convolutions import CpuConv3d, CpuDepthwiseConv3d, convert_convolutions
from mgvideo.errors import UserError
from mgvideo.models.slowfast import slow_indices

pytestmark = pytest.mark.numeric

# (frames, size) of every grid in the plans of the published recipes, with base clips of 32 and of 64 frames
PUBLISHED = [
    *((8, 112), (8, 158), (16, 112), (16, 158), (16, 224)),
    *((32, 112), (32, 158), (32, 224), (64, 112), (64, 158), (64, 224)),
]
QUICK = ("slowfast_small", "i3d_nln_small", "r2plus1d_small", "x3d_small", "mvit_small", "vit_small")

# the same layers as a smaller network of their family, only more or wider ones
LARGER = ("x3d_xs", "x3d_m", "x3d_l", "mvit_v2_b", "swin3d_s", "swin3d_b", "vit_b", "vit_l")
# all grids are tested on these and on the small networks; two or three on those that differ in depth or channels
ONE_OF_A_FAMILY = ("c2d_r50", "i3d_nln_r50", "r2plus1d_18", "r2plus1d_r50", "slow_r50", "slowfast_nln_8x8_r50")
WITH_ATTENTION = ("mvit_small", "vit_small")


def assert_trains(name: str, frames: int, size: int, batch: int) -> None:
    torch.manual_seed(0)
    model = build_narrow(name)
    logits = model(torch.randn(batch, 3, frames, size, size))
    assert logits.shape == (batch, 10)
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(("frames", "size"), [(3, 79), (1, 57), (13, 90)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGER else ()) for name in NAMES]
)
def test_every_network_trains_on_odd_clips(name: str, frames: int, size: int) -> None:
    assert_trains(name, frames, size, batch=2)


def grids_of(name: str) -> list[tuple[int, int]]:
    """Return the grids to test a network on.

    The small networks with attention are for small clips, and take minutes on the largest.
    """
    if name in WITH_ATTENTION:
        return [(frames, size) for frames, size in PUBLISHED if frames * size**2 <= 32 * 158**2]
    if name in QUICK or name in ONE_OF_A_FAMILY:
        return PUBLISHED
    few = [PUBLISHED[0], (16, 158)]
    return few if name in LARGER else [*few, (32, 224)]


def grid_param(name: str, frames: int, size: int) -> Any:
    """Mark a case slow, except all networks on the smallest grid and the small networks on most of the others."""
    quick = (frames, size) == PUBLISHED[0] and name not in LARGER
    quick |= name in QUICK and size < 224 and not (name in WITH_ATTENTION and frames > 16)
    return pytest.param(name, frames, size, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "frames", "size"), [grid_param(name, *grid) for name in NAMES for grid in grids_of(name)]
)
def test_every_network_trains_on_every_published_grid(name: str, frames: int, size: int) -> None:
    assert_trains(name, frames, size, batch=2 if frames * size**2 < 16 * 224**2 else 1)


@pytest.mark.parametrize("name", NAMES)
def test_every_convolution_has_a_fast_cpu_version(name: str) -> None:
    model = convert_convolutions(build(name) if name.startswith(("mvit", "swin3d", "vit")) else build(name, width=64))
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv3d)]
    assert all(isinstance(conv, CpuConv3d | CpuDepthwiseConv3d) for conv in convolutions)


@pytest.mark.parametrize("alpha", [2, 4, 8])
def test_slow_indices_match_published_ones(alpha: int) -> None:
    assert slow_indices(32, 4) == (0, 4, 8, 13, 17, 22, 26, 31)
    assert slow_indices(3, 8) == (0,)
    for frames in range(1, 300):
        expected = torch.linspace(0, frames - 1, max(1, frames // alpha)).long()
        assert slow_indices(frames, alpha) == tuple(expected.tolist())


def test_slow_pathway_receives_the_frames_of_slow_indices() -> None:
    model = build("slowfast_small", width=8).eval()
    inputs: list[torch.Tensor] = []
    model.slow.stem.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    frames = torch.arange(18.0).view(1, 1, 18, 1, 1).expand(2, 3, 18, 64, 64)
    with torch.no_grad():
        model(frames)
    assert inputs[0][0, 0, :, 0, 0].tolist() == [0.0, 5.0, 11.0, 17.0]


@needs_bf16
def test_clips_keep_channels_last() -> None:
    model = build("slowfast_small").to(memory_format=torch.channels_last_3d)
    clip = torch.randn(2, 8, 64, 64, 3).permute(0, 4, 1, 2, 3)
    layouts: dict[str, bool] = {}

    def record_layout(name: str, clip: torch.Tensor) -> None:
        layouts[name] = clip.is_contiguous(memory_format=torch.channels_last_3d)

    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Conv3d, torch.nn.BatchNorm3d)):
            module.register_forward_pre_hook(lambda module, args, name=name: record_layout(name, args[0]))
    # Not float32: for small clips on one thread, torch then uses a kernel that does not keep the layout.
    with torch.autocast("cpu", torch.bfloat16):
        model(clip)
    assert layouts
    assert [name for name, is_channels_last in layouts.items() if not is_channels_last] == []


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("slowfast_8x8_r50", {"depth": 18}, "depth 18"),
        ("r2plus1d_18", {"depth": 50}, "depth 50"),
        ("slowfast_8x8_r50", {"width": 12}, "width 12"),
        ("i3d_nln_r50", {"nonlocal_mode": "gaussian"}, "gaussian"),
    ],
)
def test_wrong_arguments_raise_user_error(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        build(name, **overrides)
    assert isinstance(error.value.__cause__ or error.value, UserError)


def test_slowfast_compiles_without_graph_breaks_for_every_length() -> None:
    model = build("slowfast_small", width=8).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for frames, size in [(16, 32), (18, 45)]:
            clip = torch.randn(2, 3, frames, size, size)
            torch.testing.assert_close(compiled(clip), model(clip))
