"""MViT: transformers whose attention pools queries, keys and values (arXiv 2104.11227; version 2: arXiv 2112.01526).

The networks are built of torchvision's modules, with its parameter names; `naming.py` maps PySlowFast's. torchvision's
own forward pass requires the clips that the network was built for. Here position tables are interpolated to a clip's
grid, as in PySlowFast (slowfast/models/attention.py and video_model_builder.py), so that every grid works.

Pooling is a depthwise convolution of each head's channels, then a layer norm; the class token is not pooled. Version 2
has relative positions in space and time, adds the pooled queries to the output of the attention (not for the class
token), and widens its channels inside of the attention. Version 1 has absolute positions, and widens them in the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video.mvit import MSBlockConfig, MultiscaleAttention, PositionalEncoding
from torchvision.models.video.mvit import MViT as TorchvisionMViT
from torchvision.models.video.mvit import Pool as TorchvisionPool

from mgvideo.errors import UserError

from .blocks import depths_of_parameters, run_block, set_recompute
from .pooling import MaxPool
from .resnet import Triple

PATCH_STRIDE = (2, 4, 4)  # of the first convolution: frames, height, width
KV_STRIDE = 8  # spatial stride of the first block's keys and values; as many positions remain in all stages
INIT_STD = 0.02  # standard deviation of torchvision's initial weights of linear layers, the published one


def resample(table: Tensor, length: int) -> Tensor:
    """Interpolate a table `[rows, …]` linearly to `[length, …]`, as `F.interpolate` without aligned corners does.

    It is a matrix product, because the gradient of `F.interpolate` is not deterministic on CUDA.
    """
    rows = table.shape[0]
    if rows == length:
        return table
    target = (torch.arange(length, device=table.device) + 0.5) * (rows / length) - 0.5
    distance = target.clamp(0, rows - 1)[:, None] - torch.arange(rows, device=table.device)
    weights = (1 - distance.abs()).clamp(min=0).to(table.dtype)
    return (weights @ table.flatten(1)).unflatten(1, table.shape[1:])


def relative_rows(table: Tensor, queries: int, keys: int) -> Tensor:
    """Return the rows of a table of relative positions for each query and key: `[queries, keys, c]`.

    The axis with fewer positions is stretched to the other, and the table is interpolated to its distances.
    """
    query = torch.arange(queries, device=table.device)[:, None] * max(keys / queries, 1.0)
    key = (torch.arange(keys, device=table.device)[None, :] + (1 - keys)) * max(queries / keys, 1.0)
    return resample(table, 2 * max(queries, keys) - 1)[(query - key).long()]


class Pool(TorchvisionPool):
    """torchvision's pooling of `[n, heads, 1 + tokens, c]`, in channels_last_3d, which is the order of the tokens.

    A depthwise convolution of contiguous feature maps takes about twice as long on CPUs (docs/benchmarks/speed.md).
    """

    def forward(self, x: Tensor, thw: Triple) -> tuple[Tensor, Triple]:
        """Return the pooled tokens, and their frames, height and width."""
        has_heads = x.dim() == 4
        x = x if has_heads else x[:, None]
        class_token, tokens = x[:, :, :1], x[:, :, 1:]
        maps = self.pool(tokens.flatten(0, 1).unflatten(1, thw).movedim(-1, 1))
        t, h, w = maps.shape[2:]
        tokens = maps.movedim(1, -1).flatten(1, 3).unflatten(0, x.shape[:2])
        x = torch.cat([class_token, tokens], dim=2)
        x = x if self.norm_act is None else self.norm_act(x)
        return x if has_heads else x[:, 0], (t, h, w)


class PoolingAttention(MultiscaleAttention):
    """torchvision's attention through `scaled_dot_product_attention`, with relative positions for any grid."""

    def forward(self, x: Tensor, thw: Triple) -> tuple[Tensor, Triple]:
        """`[n, 1 + tokens, c]` and its frames, height and width → the same after the queries were pooled."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()  # [n, heads, 1 + tokens, c / heads]
        key_thw = thw
        if self.pool_k is not None and self.pool_v is not None:
            (key, key_thw), (value, _) = self.pool_k(key, thw), self.pool_v(value, thw)
        if self.pool_q is not None:
            query, thw = self.pool_q(query, thw)
        bias = None if self.rel_pos_h is None else self._position_bias(query[:, :, 1:], thw, key_thw)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        if self.residual_pool:
            x = x + (query if self.residual_with_cls_embed else F.pad(query[:, :, 1:], (0, 0, 1, 0)))
        return self.project(x.transpose(1, 2).flatten(2)), thw

    def _position_bias(self, query: Tensor, thw: Triple, key_thw: Triple) -> Tensor:
        """Return what relative positions add to the attention, `[n, heads, 1 + queries, 1 + keys]`.

        The class token has no position: its row and column are zero.
        """
        query = query.unflatten(2, thw)
        tables = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        rows = [relative_rows(table, q, k) for table, q, k in zip(tables, thw, key_thw, strict=True)]  # type: ignore[arg-type]
        frames, heights, widths = (
            torch.einsum(f"nathwc,{axis}kc->nathwk", query, row) for axis, row in zip("thw", rows, strict=True)
        )
        bias = frames[..., :, None, None] + heights[..., None, :, None] + widths[..., None, None, :]
        return F.pad(bias.flatten(5).flatten(2, 4), (1, 0, 1, 0))


class Positions(PositionalEncoding):
    """torchvision's class token and absolute positions, interpolated to any grid."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[n, t, h, w, c]` → `[n, 1 + t · h · w, c]`, the class token first."""
        t, h, w = x.shape[1:4]
        class_token = self.class_token
        if self.spatial_pos is not None and self.temporal_pos is not None and self.class_pos is not None:
            spatial = resample(self.spatial_pos.unflatten(0, self.spatial_size), h)  # [h, width of the table, c]
            spatial = resample(spatial.transpose(0, 1), w).transpose(0, 1)
            x = x + spatial + resample(self.temporal_pos, t)[:, None, None]
            class_token = class_token + self.class_pos
        return torch.cat([class_token.expand(len(x), 1, -1).to(x.dtype), x.flatten(1, 3)], dim=1)


# torchvision's classes and those that replace them
REPLACEMENTS: Mapping[type[nn.Module], type[nn.Module]] = {
    TorchvisionPool: Pool,
    MultiscaleAttention: PoolingAttention,
    PositionalEncoding: Positions,
}


class MViT(TorchvisionMViT):
    """MViT: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w. Arguments as of `mvit`.

    Attributes:
        no_weight_decay: patterns of `fnmatch` for parameters without weight decay, besides norms and biases.
    """

    no_weight_decay = ("pos_encoding.*", "*.rel_pos_?")

    def __init__(
        self,
        num_classes: int,
        block_setting: Sequence[MSBlockConfig],
        *,
        version: int,
        table_clip: tuple[int, int],
        dropout: float,
        drop_path: float,
        checkpointing: bool,
        init_std: float,
    ) -> None:
        frames, size = table_clip
        second = version == 2
        super().__init__(
            spatial_size=(size, size),
            temporal_size=frames,
            block_setting=block_setting,
            residual_pool=second,
            residual_with_cls_embed=False,
            rel_pos_embed=second,
            proj_after_attn=second,
            dropout=dropout,
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        for module in self.modules():
            if type(module) in REPLACEMENTS:
                module.__class__ = REPLACEMENTS[type(module)]
            if isinstance(module, Pool) and isinstance(module.pool, nn.MaxPool3d):
                module.pool = MaxPool(module.pool.kernel_size, module.pool.stride, module.pool.padding)
            if isinstance(module, nn.Linear):
                module.weight.data *= init_std / INIT_STD  # drawing them again would change those of published networks
        set_recompute(self.blocks, checkpointing)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, t, h, w]` → `[n, classes]`."""
        x = self.conv_proj(x).movedim(1, -1)
        thw = tuple(x.shape[1:4])
        x = self.pos_encoding(x)
        for block in self.blocks:
            x, thw = run_block(block, x, thw)
        return self.head(self.norm(x)[:, 0])

    def parameter_depths(self) -> dict[str, int]:
        """Return the depth of each parameter: 0 for the embedding, 1 for the first block, …, the most for the head."""
        return depths_of_parameters(self, [self.conv_proj, self.pos_encoding], [[block] for block in self.blocks])


def block_settings(width: int, depth: int, stages: Sequence[int], version: int) -> list[MSBlockConfig]:
    """Return the settings of all blocks.

    A stage starts at each block of `stages`: it halves height and width, and has twice the heads. Version 2 doubles the
    channels in that block, version 1 in the block before it. Only in version 1 have the other blocks no pooling of
    queries.
    """
    settings = []
    channels, heads, stride = width, 1, KV_STRIDE
    for i in range(depth):
        starts = i in stages
        if starts:
            heads, stride = 2 * heads, max(1, stride // 2)
        widens = starts if version == 2 else i + 1 in stages
        pools_queries = starts or version == 2
        settings.append(
            MSBlockConfig(
                num_heads=heads,
                input_channels=channels,
                output_channels=2 * channels if widens else channels,
                kernel_q=[3, 3, 3] if pools_queries else [],
                kernel_kv=[3, 3, 3],
                stride_q=([1, 2, 2] if starts else [1, 1, 1]) if pools_queries else [],
                stride_kv=[1, stride, stride],
            )
        )
        channels = settings[-1].output_channels
    return settings


def mvit(
    num_classes: int,
    *,
    width: int = 96,
    depth: int = 16,
    stages: Sequence[int] = (1, 3, 14),
    version: int = 2,
    table_frames: int = 16,
    table_size: int = 224,
    dropout: float = 0.5,
    drop_path: float = 0.2,
    checkpointing: bool = False,
    init_std: float = INIT_STD,
) -> MViT:
    """MViT as published. B of version 1 and S of version 2 have 16 blocks; B of version 2 has 24, with stages 2, 5, 21.

    Args:
        num_classes: the number of logits.
        width: channels of the first stage; each later stage doubles them.
        depth: number of blocks.
        stages: the indices of the blocks that start the second and later stages.
        version: 1 or 2.
        table_frames: frames of the clips that the position tables are made for. Clips may have any other number.
        table_size: their height and width.
        dropout: probability before the last linear layer.
        drop_path: probability to drop a branch of the last block; it rises linearly from 0 in the first.
        checkpointing: save only the inputs of the blocks, and run them again in backward.
        init_std: standard deviation of the initial weights of linear layers.
    """
    if version not in (1, 2):
        raise UserError(f"MViT: version {version}: choose 1 or 2")
    if depth < 2 or not all(0 < stage < depth for stage in stages):
        raise UserError(f"MViT: stages {list(stages)} of {depth} blocks: give indices from 1 to {depth - 1}")
    if table_frames < PATCH_STRIDE[0] or table_size < PATCH_STRIDE[1] * 2 ** len(stages):
        raise UserError(f"MViT: position tables for {table_frames} × {table_size}²: choose larger clips")
    return MViT(
        num_classes,
        block_settings(width, depth, stages, version),
        version=version,
        table_clip=(table_frames, table_size),
        dropout=dropout,
        drop_path=drop_path,
        checkpointing=checkpointing,
        init_std=init_std,
    )
