"""Class activation maps: where and when a class's logit comes from (Zhou et al., CVPR 2016, arXiv 1512.04150)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def class_maps(model: nn.Module, clips: Tensor, label: int) -> list[Tensor]:
    """What each position of the last feature maps adds to a class: float32 `[n, t', h', w']`, one map a pathway.

    Every network here averages its features over all positions before one linear layer, so this is exact: the maps'
    means add up to the logit less its bias. SlowFast has two maps, slow then fast. `clips` is as the network takes it.
    """
    network: Any = model
    pooling, fc = (network.avgpool, network.fc) if hasattr(model, "avgpool") else (network.head, network.head.fc)
    features: list[Tensor] = []
    hook = pooling.register_forward_pre_hook(lambda module, inputs: features.extend(inputs))
    try:
        model(clips)
    finally:
        hook.remove()
    weights = fc.weight[label].float().split([pathway.shape[1] for pathway in features])
    # no matrix product, which autocast would round
    return [(f.float() * w.view(-1, 1, 1, 1)).sum(1) for f, w in zip(features, weights, strict=True)]


def sum_pathway_maps(maps: Sequence[Tensor]) -> Tensor:
    """The sum of the pathways' maps, `[n, t', h', w']` of the longest, to whose time the others are stretched."""
    size = (max(pathway.shape[1] for pathway in maps), *maps[0].shape[2:])
    stretched = [interpolate(pathway[None], size, mode="trilinear", align_corners=False)[0] for pathway in maps]
    return torch.stack(stretched).sum(0)
