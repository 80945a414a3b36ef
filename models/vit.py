"""ViT for video as in VideoMAE: joint attention over tubelets of 2 × 16 × 16 (Tong et al., arXiv 2203.12602).

The network is the authors' (MCG-NJU/VideoMAE, modeling_finetune.py), with their parameter names: no class token, fixed
sine-cosine positions, biases for queries and values but not for keys, logits from the normalised mean over all tokens.
Layer norm has eps 1e-6 (1e-12 in transformers, which differs less than rounding does).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from mgvideo.errors import UserError

from .blocks import depths_of_parameters, run_block, set_recompute

TUBELET_FRAMES = 2
MLP_RATIO = 4  # hidden channels of a block's MLP, as a multiple of the width
EPS = 1e-6  # of layer norm
PERIOD = 10_000  # of the slowest sine is 2π times this number of tokens


def sine_cosine_positions(tokens: int, channels: int, device: torch.device) -> Tensor:
    """Return the encodings of positions 0 … tokens − 1, float32 `[tokens, channels]` (arXiv 1706.03762, section 3.5).

    As published, a position is the index of the token in the clip's grid, frames first. So each grid has its own
    positions, and the number of frames does not change those of the frames before. Angles are reduced in float64,
    because float32 has no digits left for the sine of an angle of 10⁴.
    """
    periods = PERIOD ** (torch.arange(0, channels, 2, device=device, dtype=torch.float64) / channels)
    angles = torch.arange(tokens, device=device, dtype=torch.float64)[:, None] / periods
    angles = angles.remainder(2 * math.pi).float()
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class TubeletEmbedding(nn.Module):
    """A linear layer on each tubelet of 2 × patch × patch pixels.

    `[n, 3, t, h, w]` → tokens `[n, t / 2, h / patch, w / patch, c]`. Clips are padded with zeros
    (the mean colour) to whole tubelets, at the end.
    """

    def __init__(self, channels: int, patch_size: int) -> None:
        super().__init__()
        tubelet = (TUBELET_FRAMES, patch_size, patch_size)
        self.proj = nn.Conv3d(3, channels, tubelet, tubelet)

    def forward(self, x: Tensor) -> Tensor:
        """Embed `[n, 3, t, h, w]`."""
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.proj.kernel_size, strict=True)]
        if any(missing):
            x = F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))
        return self.proj(x).movedim(1, -1)


class Attention(nn.Module):
    """Self-attention over all tokens of a clip, `[n, tokens, c]` → `[n, tokens, c]`. Keys have no bias."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # [n, heads, tokens, c / heads]
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[…, c]` → `[…, c]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block on `[n, tokens, c]`."""

    def __init__(self, channels: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, EPS)
        self.attn = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, EPS)
        self.mlp = MLP(channels)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x: Tensor) -> Tensor:
        """Add attention and MLP."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT for video: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w. Arguments as of `vit`.

    Attributes:
        no_weight_decay: patterns of `fnmatch` for parameters without weight decay, besides norms and biases: none,
            because positions are not learned.
    """

    no_weight_decay: tuple[str, ...] = ()

    def __init__(
        self,
        num_classes: int,
        *,
        width: int,
        depth: int,
        heads: int,
        patch_size: int,
        dropout: float,
        drop_path: float,
        checkpointing: bool,
        init_std: float,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise UserError(f"ViT: width {width} for {heads} heads: choose a multiple of {2 * heads}")
        self.patch_embed = TubeletEmbedding(width, patch_size)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, rate) for rate in rates)
        self.fc_norm = nn.LayerNorm(width, EPS)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        set_recompute(self.blocks, checkpointing)

    def tokens(self, x: Tensor) -> Tensor:
        """Return the tokens after the last block, `[n, t / 2, h / patch, w / patch, c]`."""
        x = self.patch_embed(x)
        grid = x.shape[1:4]
        x = x.flatten(1, 3)
        x = x + sine_cosine_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        for block in self.blocks:
            x = run_block(block, x)
        return x.unflatten(1, grid)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, t, h, w]` → `[n, classes]`."""
        return self.head(self.dropout(self.fc_norm(self.tokens(x).mean((1, 2, 3)))))

    def parameter_depths(self) -> dict[str, int]:
        """Return the depth of each parameter: 0 for the embedding, 1 for the first block, …, the most for the head."""
        return depths_of_parameters(self, [self.patch_embed], [[block] for block in self.blocks])


def vit(
    num_classes: int,
    *,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    patch_size: int = 16,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    init_std: float = 0.02,
) -> VisionTransformer:
    """ViT as in VideoMAE. S has width 384 and 6 heads, B 768 and 12, L 1,024 and 16 with depth 24.

    Args:
        num_classes: the number of logits.
        width: channels of a token.
        depth: number of blocks.
        heads: of the attention.
        patch_size: height and width of the pixels in a token.
        dropout: probability before the last linear layer.
        drop_path: probability to drop a branch of the last block; it rises linearly from 0 in the first.
        checkpointing: save only the inputs of the blocks, and run them again in backward.
        init_std: standard deviation of the initial weights of linear layers.
    """
    return VisionTransformer(
        num_classes,
        width=width,
        depth=depth,
        heads=heads,
        patch_size=patch_size,
        dropout=dropout,
        drop_path=drop_path,
        checkpointing=checkpointing,
        init_std=init_std,
    )
