"""Class activation maps: exact, and where the class is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build

from mgvideo.models.cam import class_maps, sum_pathway_maps

pytestmark = pytest.mark.numeric

FAMILIES = ["slow_r50", "i3d_nln_small", "slowfast_8x8_r50", "slowfast_small", "r2plus1d_18", "r2plus1d_r50"]


def network(name: str) -> nn.Module:
    """A small network whose residual branches add something."""
    torch.manual_seed(0)
    model = build(name, width=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.2, 0.6)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_means_are_the_logit_less_its_bias(name: str) -> None:
    model = network(name)
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
    model, clips = network("slowfast_small"), torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = class_maps(model, clips, 0)
    assert {pathway.dtype for pathway in maps} == {torch.float32}


def test_pathways_are_joined_over_the_longer_time() -> None:
    slow, fast = torch.full((1, 2, 3, 4), 1.0), torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 3, 4)
    together = sum_pathway_maps([slow, fast])
    assert together.shape == fast.shape
    torch.testing.assert_close(together, fast + 1)
