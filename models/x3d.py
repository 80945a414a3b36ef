"""X3D: narrow bottlenecks with depthwise 3×3×3 convolutions (Feichtenhofer, CVPR 2020, arXiv 2004.04730).

The networks are those of PySlowFast (configs/Kinetics/X3D_*.yaml, slowfast/models/video_model_builder.py): batch norm
has eps 1e-5 and momentum 0.1, the inner activation is swish, every other block has squeeze-and-excitation, and no stage
halves the frames. PyTorchVideo's networks have no batch norm on the shortcut of the first block
(`shortcut_norm=False`).
"""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn

from mgvideo.errors import UserError

from .blocks import run_block, set_recompute
from .resnet import Triple, conv, init_weights

STAGE_BLOCKS = (1, 2, 5, 3)  # blocks of res2 … res5 at depth_factor 1
BOTTLENECK_FACTOR = 2.25  # inner channels of a block, as a multiple of its output channels
SE_RATIO = 1 / 16  # channels of squeeze-and-excitation, as a fraction of its input's
HEAD_CHANNELS = 2048  # input of the classifier, as published


def round_channels(channels: float) -> int:
    """Round to a multiple of 8, at least 8, and by at most a tenth downwards, as PySlowFast's `round_width` does."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor from 0 to 1, computed from the clip's mean of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = round_channels(channels * SE_RATIO)
        self.fc1 = nn.Conv3d(channels, inner, 1)
        self.fc2 = nn.Conv3d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, c, t, h, w]`."""
        scale = self.fc2(self.fc1(x.mean((2, 3, 4), keepdim=True)).relu())
        return x * scale.sigmoid()


class X3DBlock(nn.Module):
    """1×1×1, depthwise 3×3×3 and 1×1×1 convolutions with a shortcut: `[n, c, t, h, w]` → `[n, c', t, h / s, w / s]`."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, se: bool, shortcut_norm: bool) -> None:
        super().__init__()
        inner = int(BOTTLENECK_FACTOR * channels)
        strides: Triple = (1, stride, stride)
        self.conv_a = conv(in_channels, inner, (1, 1, 1))
        self.bn_a = nn.BatchNorm3d(inner)
        self.conv_b = conv(inner, inner, (3, 3, 3), strides, groups=inner)
        self.bn_b = nn.BatchNorm3d(inner)
        self.se = SqueezeExcitation(inner) if se else nn.Identity()
        self.swish = nn.SiLU(inplace=True)
        self.conv_c = conv(inner, channels, (1, 1, 1))
        self.bn_c = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.projects = in_channels != channels or stride != 1
        if self.projects:
            self.shortcut = conv(in_channels, channels, (1, 1, 1), strides)
            self.shortcut_bn = nn.BatchNorm3d(channels) if shortcut_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, out, t, h', w']`."""
        branch = self.relu(self.bn_a(self.conv_a(x)))
        branch = self.swish(self.se(self.bn_b(self.conv_b(branch))))
        branch = self.bn_c(self.conv_c(branch))
        if self.projects:
            x = self.shortcut_bn(self.shortcut(x))
        return self.relu(x + branch)


class X3DStage(nn.Sequential):
    """The blocks of a stage, of which those marked by `set_recompute` run again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, out, t, h / 2, w / 2]`."""
        for block in self:
            x = run_block(block, x)
        return x


class X3DHead(nn.Module):
    """1×1×1 convolution, average over all positions, two linear layers with a ReLU between them."""

    def __init__(self, in_channels: int, inner: int, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.conv = conv(in_channels, inner, (1, 1, 1))
        self.bn = nn.BatchNorm3d(inner)
        self.lin = conv(inner, channels, (1, 1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Features `[n, c, t, h, w]` → logits `[n, classes]`."""
        pooled = self.bn(self.conv(x)).relu().mean((2, 3, 4), keepdim=True)
        return self.fc(self.dropout(self.lin(pooled).relu().flatten(1)))


class X3D(nn.Module):
    """X3D: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w.

    `blocks` is the number of blocks of each stage, `head_channels` the input of the classifier. The other arguments are
    those of `x3d`.
    """

    def __init__(
        self,
        num_classes: int,
        blocks: tuple[int, ...],
        *,
        width: int,
        dropout: float,
        shortcut_norm: bool,
        checkpointing: bool,
        head_channels: int = HEAD_CHANNELS,
    ) -> None:
        super().__init__()
        stem = OrderedDict(
            conv_xy=conv(3, width, (1, 3, 3), (1, 2, 2)),
            conv=conv(width, width, (5, 1, 1), groups=width),
            bn=nn.BatchNorm3d(width),
            relu=nn.ReLU(inplace=True),
        )
        self.trunk = nn.Sequential(OrderedDict(stem=nn.Sequential(stem)))
        in_channels = channels = width
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(count):
                first = stage == 0 and i == 0
                layers[f"block{i}"] = X3DBlock(
                    in_channels, channels, 2 if i == 0 else 1, se=i % 2 == 0, shortcut_norm=shortcut_norm or not first
                )
                in_channels = channels
            self.trunk.add_module(f"res{stage + 2}", X3DStage(layers))
        self.head = X3DHead(channels, int(BOTTLENECK_FACTOR * channels), head_channels, num_classes, dropout)
        init_weights(self)
        residual_blocks = [module for module in self.modules() if isinstance(module, X3DBlock)]
        for block in residual_blocks:
            nn.init.zeros_(block.bn_c.weight)
        set_recompute(residual_blocks, checkpointing)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, t, h, w]` → `[n, classes]`."""
        return self.head(self.trunk(x))


def x3d(
    num_classes: int,
    *,
    width: int = 24,
    depth_factor: float = 2.2,
    dropout: float = 0.5,
    shortcut_norm: bool = True,
    checkpointing: bool = False,
) -> X3D:
    """X3D as published: XS, S and M have a `depth_factor` of 2.2 and differ in their clips, L has 5.

    Args:
        num_classes: the number of logits.
        width: channels of the stem; the stages have 1, 2, 4 and 8 times as many.
        depth_factor: the stages have 1, 2, 5 and 3 times as many blocks, rounded up.
        dropout: probability before the last linear layer.
        shortcut_norm: batch norm on the shortcut of the first block; False: as in PyTorchVideo.
        checkpointing: save only the inputs of the blocks, and run them again in backward.
    """
    if width < 1 or not 0 < depth_factor < 100:
        raise UserError(f"X3D: width {width}, depth_factor {depth_factor}: both must be positive")
    blocks = tuple(math.ceil(depth_factor * count) for count in STAGE_BLOCKS)
    return X3D(
        num_classes, blocks, width=width, dropout=dropout, shortcut_norm=shortcut_norm, checkpointing=checkpointing
    )
