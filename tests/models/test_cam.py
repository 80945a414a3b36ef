"""Class activation maps add up to the logits and have the right shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build

from mgvideo.models.cam import class_maps, sum_pathway_maps

pytestmark = pytest.mark.numeric

FAMILIES = ["slow_r50", "i3d_nln_small", "slowfast_8x8_r50", "slowfast_small", "r2plus1d_18", "r2plus1d_r50"]


def build_active(name: str) -> nn.Module:
    """Build a narrow network whose residual branches do not return zero."""
    torch.manual_seed(0)
    model = build(name, width=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.2, 0.6)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_means_of_maps_add_up_to_logit_without_bias(name: str) -> None:
    model = build_active(name)
    clips = torch.randn(2, 3, 9, 70, 50)
    with torch.no_grad():
        nn.init.uniform_(model.fc.bias if hasattr(model, "fc") else model.head.fc.bias)
        logits, maps = model(clips), class_maps(model, clips, 3)
    bias = (model.fc if hasattr(model, "fc") else model.head.fc).bias[3]
    assert len(maps) == (2 if name.startswith("slowfast") else 1)
    total = sum(pathway.mean((1, 2, 3)) for pathway in maps)
    torch.testing.assert_close(total + bias, logits[:, 3])
    assert not model.head._forward_pre_hooks if hasattr(model, "head") else not model.avgpool._forward_pre_hooks


def test_autocast_does_not_round_maps() -> None:
    model, clips = build_active("slowfast_small"), torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = class_maps(model, clips, 0)
    assert {pathway.dtype for pathway in maps} == {torch.float32}


def test_maps_of_pathways_are_summed_over_the_longer_time() -> None:
    slow, fast = torch.full((1, 2, 3, 4), 1.0), torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 3, 4)
    total = sum_pathway_maps([slow, fast])
    assert total.shape == fast.shape
    torch.testing.assert_close(total, fast + 1)
