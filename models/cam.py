"""Class activation maps: which positions contribute to a class's logit (Zhou et al., CVPR 2016, arXiv 1512.04150)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def class_maps(model: nn.Module, clips: Tensor, label: int) -> list[Tensor]:
    """Compute the contribution of each position of the last feature maps to a class.

    Every network here averages its features over all positions before one linear layer. So the maps are exact: the
    sum of their means is the logit minus the bias.

    Args:
        model: one of the networks of `mgvideo.models`.
        clips: the network's input, float `[n, 3, t, h, w]`.
        label: the class.

    Returns:
        One map for each pathway, float32 `[n, t', h', w']`. SlowFast has two: slow, then fast.
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
    # not a matrix product, because autocast would round it
    return [(f.float() * w.view(-1, 1, 1, 1)).sum(1) for f, w in zip(features, weights, strict=True)]


def sum_pathway_maps(maps: Sequence[Tensor]) -> Tensor:
    """Sum the maps of all pathways after interpolating them to the longest: `[n, t', h', w']` with its `t'`."""
    size = (max(pathway.shape[1] for pathway in maps), *maps[0].shape[2:])
    stretched = [interpolate(pathway[None], size, mode="trilinear", align_corners=False)[0] for pathway in maps]
    return torch.stack(stretched).sum(0)
