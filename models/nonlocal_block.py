"""Non-local block: every position of a clip attends to every other (Wang et al., CVPR 2018, arXiv 1711.07971)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mgvideo.errors import UserError

from .pooling import max_pool


class NonLocal(nn.Module):
    """Adds to `[n, c, t, h, w]` what each position gathers from all positions, keys and values pooled 2×2 in space.

    `mode` is how the affinity of positions is normalised: `softmax`, or `dot_product`, which divides by their number.
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
        # A grid can be so small that there is nothing left to pool.
        window = (1, min(2, x.shape[3]), min(2, x.shape[4]))
        pooled = max_pool(x, window)
        query, key, value = (
            conv(source).flatten(2).transpose(1, 2)  # [n, positions, inner]
            for conv, source in ((self.theta, x), (self.phi, pooled), (self.g, pooled))
        )
        if self.mode == "softmax":
            # one head: without a dimension of heads, CUDA's fused kernels are passed over
            gathered = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        else:
            # Without a softmax the product is associative, and inner × inner is far smaller than positions × positions.
            gathered = query @ (key.transpose(1, 2) @ value / key.shape[1])
        gathered = gathered.transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.bn(self.out(gathered))
