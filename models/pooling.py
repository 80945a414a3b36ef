"""Max pooling in the precision of what is pooled."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

Sizes = int | tuple[int, int, int]


def max_pool(x: Tensor, kernel: Sizes, stride: Sizes | None = None, padding: Sizes = (0, 0, 0)) -> Tensor:
    """`F.max_pool3d` of `[n, c, t, h, w]`.

    Asked for no indices, it is float32 under a CPU's autocast, which costs time and changes no maximum.
    """
    return F.max_pool3d(x, kernel, stride, padding, return_indices=True)[0]


class MaxPool(nn.MaxPool3d):
    """`max_pool` as a module."""

    def forward(self, input: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, c, t', h', w']`."""
        return max_pool(input, self.kernel_size, self.stride, self.padding)


class TemporalPool(nn.Module):
    """Max over pairs of frames; a single frame stays as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, c, t // 2, h, w]`."""
        return max_pool(x, (min(2, x.shape[2]), 1, 1))
