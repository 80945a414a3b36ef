"""Statistics of BN groups, summed over forward passes and ranks, and the running statistics that they update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .batchnorm import GroupBatchNorm3d


class GroupStatistics(NamedTuple):
    """Statistics of one forward pass: mean and spread of each group. Each of the `ranks` that share a group has a part.

    `spread` holds unbiased variances if `size` is 0. Otherwise it holds inverse standard deviations as the kernel
    computes them from `size` values with `eps`.
    """

    mean: Tensor  # [groups, channels]
    spread: Tensor  # [groups, channels]
    ranks: int = 1
    size: int = 0
    eps: float = 0.0


def sum_over_groups(statistics: GroupStatistics) -> Tensor:
    """Sum mean, mean², variance and 1 over groups: float64 `[4, channels]`.

    Each of the ranks that share a group contributes an equal part. float64 keeps the variance of the means precise,
    which is later computed as the mean of squares minus the square of the mean.
    """
    mean, var = statistics.mean.double(), statistics.spread.double()
    if statistics.size:
        var = (var.pow(-2) - statistics.eps).clamp(min=0) * (statistics.size / (statistics.size - 1))
    return torch.stack((mean, mean.square(), var, torch.ones_like(mean))).sum(1) / statistics.ranks


@torch.no_grad()
def add_deferred(layers: Sequence[GroupBatchNorm3d]) -> None:
    """Add the statistics of the layers' deferred forward passes to their sums.

    First joins the forward passes of each layer, then the layers with the same number of groups: the tensors are so
    small that the number of calls determines the time.
    """
    layers_by_kind = defaultdict(list)  # by number of groups and (ranks, size, eps)
    for layer in layers:
        forwards_by_kind = defaultdict(list)  # by (ranks, size, eps)
        for statistics in layer.deferred_forwards:
            forwards_by_kind[statistics[2:]].append(statistics)
        for kind, forwards in forwards_by_kind.items():
            mean = torch.cat([statistics.mean for statistics in forwards])
            spread = torch.cat([statistics.spread for statistics in forwards])
            layers_by_kind[len(mean), kind].append((layer.deferred_sums, mean, spread))
        layer.deferred_forwards = []
    for (_, kind), same_kind in layers_by_kind.items():
        sums, means, spreads = zip(*same_kind, strict=True)
        statistics = GroupStatistics(torch.cat(means, dim=1), torch.cat(spreads, dim=1), *kind)
        torch._foreach_add_(list(sums), sum_over_groups(statistics).split([mean.shape[1] for mean in means], dim=1))


@torch.no_grad()
def update_running_stats(layers: Sequence[GroupBatchNorm3d], sums: Tensor, momentum: float | None = None) -> None:
    """Move the running mean towards the mean of the groups' means, and the running variance towards the mean of their
    variances plus the variance of their means.

    `sums` holds the `sum_over_groups` of the layers side by side; `momentum` replaces theirs. A layer that did not run
    keeps its statistics.
    """
    count = sums[3]
    mean, square, var = sums[:3] / torch.where(count > 0, count, 1)
    var = var + (square - mean.square())
    dtype, sizes = layers[0].running_mean.dtype, [layer.num_features for layer in layers]
    means, variances, ran = (flat.to(dtype).split(sizes) for flat in (mean, var, count > 0))
    torch._foreach_add_([layer.num_batches_tracked for layer in layers], [part[0] > 0 for part in ran])
    momenta = [layer.momentum if momentum is None else momentum for layer in layers]
    weights = torch._foreach_mul(ran, [1.0 if value is None else value for value in momenta])
    for layer, weight, value in zip(layers, weights, momenta, strict=True):
        if value is None:  # momentum=None of nn.BatchNorm3d: the plain average of all updates
            weight /= layer.num_batches_tracked.clamp(min=1)
    torch._foreach_lerp_([layer.running_mean for layer in layers], means, weights)
    torch._foreach_lerp_([layer.running_var for layer in layers], variances, weights)
