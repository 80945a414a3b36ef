"""Class activation maps: which positions contribute to a class's logit (Zhou et al., CVPR 2016, arXiv 1512.04150)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mgvideo.errors import UserError

from .resnet import Head
from .vit import VisionTransformer

MAX_ROUNDING = 0.02  # of a mean in bf16, relative to the largest


def class_maps(model: nn.Module, clips: Tensor, label: int) -> list[Tensor]:
    """Compute the contribution of each position of the last feature maps to a class.

    The network averages its features over all positions before one linear layer. So the maps are exact: the sum of
    their means is the logit minus the bias. Layers need no particular names. The ViT has a layer norm after the
    average, which is linear for a given clip: its map is exact too, without the norm's own bias.

    Args:
        model: the network.
        clips: its input, float `[n, 3, t, h, w]`.
        label: the class.

    Returns:
        One map for each pathway, float32 `[n, t', h', w']`. SlowFast has two: slow, then fast.

    Raises:
        UserError: the network does not end in a global average and a linear layer.
    """
    if isinstance(model, VisionTransformer):
        return [_normalised_map(model, clips, label)]
    head = getattr(model, "head", None)
    features, fc = _pathways(model, head, clips) if isinstance(head, Head) else _averaged_features(model, clips)
    weights = fc.weight[label].float().split([pathway.shape[1] for pathway in features])
    # not a matrix product, because autocast would round it
    return [(f.float() * w.view(-1, 1, 1, 1)).sum(1) for f, w in zip(features, weights, strict=True)]


def _normalised_map(model: VisionTransformer, clips: Tensor, label: int) -> Tensor:
    """Return the contributions of a ViT's tokens, `[n, t', h', w']`.

    The norm subtracts from each token's features their mean, and divides all by the deviation of the clip's average.
    """
    tokens = model.tokens(clips).float()
    deviation = (tokens.mean((1, 2, 3)).var(1, correction=0) + model.fc_norm.eps).sqrt()
    weights = (model.head.weight[label] * model.fc_norm.weight).float()
    contributions = ((tokens - tokens.mean(-1, keepdim=True)) * weights).sum(-1)
    return contributions / deviation[:, None, None, None]


def _pathways(model: nn.Module, head: Head, clips: Tensor) -> tuple[list[Tensor], nn.Linear]:
    """Return the features that the head of one of our networks averages, one for each pathway, and its linear layer."""
    features: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: features.extend(inputs))
    try:
        model(clips)
    finally:
        hook.remove()
    return features, head.fc


def _averaged_features(model: nn.Module, clips: Tensor) -> tuple[list[Tensor], nn.Linear]:
    """Return the features whose mean over all positions is the input of the last linear layer, and that layer.

    They are found by comparing values, so the average may be a layer or a function.
    """
    latest: dict[tuple[int, ...], Tensor] = {}  # the last input or output of each shape [n, c, t, h, w]
    calls: list[tuple[nn.Linear, Tensor, list[Tensor]]] = []  # layer, its input, features with as many channels

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Linear) and inputs[0].dim() == 2:
            same_channels = [f for shape, f in latest.items() if shape[:2] == inputs[0].shape]
            calls[:] = [(module, inputs[0], same_channels)]
        else:
            features = [value for value in (*inputs, output) if isinstance(value, Tensor) and value.dim() == 5]
            latest.update({tuple(value.shape): value for value in features})

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    try:
        model(clips)
    finally:
        for hook in hooks:
            hook.remove()
    for fc, pooled, candidates in calls:
        tolerance = MAX_ROUNDING * pooled.float().abs().max().item()
        found = [f for f in candidates if (f.float().mean((2, 3, 4)) - pooled.float()).abs().max().item() <= tolerance]
        if found:
            return [max(found, key=Tensor.numel)], fc
    if isinstance(getattr(model, "pos_encoding", None), nn.Module):
        raise UserError(
            f"{type(model).__name__} has no class-activation maps: its logits depend on the class token alone, and its "
            "pooling changes the positions from block to block"
        )
    raise UserError(
        f"{type(model).__name__} has no class-activation maps: they need feature maps [n, c, t, h, w], averaged over "
        "all positions and given to one nn.Linear at the end"
    )


def sum_pathway_maps(maps: Sequence[Tensor]) -> Tensor:
    """Sum the maps of all pathways after interpolating them to the longest: `[n, t', h', w']` with its `t'`."""
    size = (max(pathway.shape[1] for pathway in maps), *maps[0].shape[2:])
    stretched = [interpolate(pathway[None], size, mode="trilinear", align_corners=False)[0] for pathway in maps]
    return torch.stack(stretched).sum(0)
