"""Non-local block: every position of a clip attends to every other (Wang et al., CVPR 2018, arXiv 1711.07971)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mgvideo.errors import UserError

from .pooling import max_pool


class NonLocal(nn.Module):
    """Attention over all positions of `[n, c, t, h, w]`, with a residual connection.

    Keys and values are max-pooled 2×2 in space. `mode` is how the affinities are normalised: `softmax`, or
    `dot_product`, which divides them by the number of keys.
    """

    def __init__(self, channels: int, mode: str) -> None:
        super().__init__()
        if mode not in ("softmax", "dot_product"):
            raise UserError(f"nonlocal_mode is '{mode}': choose softmax or dot_product")
        self.mode = mode
        inner = channels // 2
        self.theta = nn.Conv3d(channels, inner, 1)
        self.phi = nn.Conv3d(channels, inner, 1)
        self.g = nn.Conv3d(channels, inner, 1)
        self.out = nn.Conv3d(inner, channels, 1)
        self.bn = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, c, t, h, w]`."""
        # On a small grid, height or width can be 1.
        window = (1, min(2, x.shape[3]), min(2, x.shape[4]))
        pooled = max_pool(x, window)
        query, key, value = (
            conv(features).flatten(2).transpose(1, 2)  # [n, positions, inner]
            for conv, features in ((self.theta, x), (self.phi, pooled), (self.g, pooled))
        )
        if self.mode == "softmax":
            # CUDA's fused kernels require a dimension of heads, here of size 1
            gathered = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        else:
            # Without softmax the product is associative: inner × inner is far smaller than positions × positions.
            gathered = query @ (key.transpose(1, 2) @ value / key.shape[1])
        gathered = gathered.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.bn(self.out(gathered))
