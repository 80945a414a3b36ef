"""R(2+1)D: 3D convolutions factored into space and time (Tran et al., arXiv 1711.11248).

`r2plus1d` is torchvision's network, with its blocks and parameter names, for any width and number of stages.
`r2plus1d_bottleneck` is PyTorchVideo's network: bottlenecks whose temporal convolution precedes the spatial one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D

from mgvideo.errors import UserError

from .resnet import BLOCKS, EXPANSION, Bottleneck, Head, Stem, Triple, conv, init_weights

BASIC_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # depth → blocks in layer1 … layer4


class R2Plus1D(nn.Sequential):
    """torchvision's R(2+1)D: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w.

    `blocks` is the number of blocks of each stage. Every stage after the first doubles the channels and halves frames,
    height and width.
    """

    def __init__(self, num_classes: int, blocks: Sequence[int], *, width: int, dropout: float) -> None:
        middle = width * 45 // 64  # 45/64 gives about as many parameters as a full 3×7×7 convolution
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            stem=nn.Sequential(
                conv(3, middle, (1, 7, 7), (1, 2, 2)),
                nn.BatchNorm3d(middle),
                nn.ReLU(inplace=True),
                conv(middle, width, (3, 1, 1)),
                nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
            )
        )
        in_channels = width
        for stage, count in enumerate(blocks):
            channels = width * 2**stage
            layers[f"layer{stage + 1}"] = basic_stage(in_channels, channels, count, stride=1 if stage == 0 else 2)
            in_channels = channels
        layers.update(
            avgpool=nn.AdaptiveAvgPool3d(1),
            flatten=nn.Flatten(),
            dropout=nn.Dropout(dropout),
            fc=nn.Linear(in_channels, num_classes),
        )
        super().__init__(layers)
        init_weights(self)


def basic_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a stage of torchvision's basic (2+1)D blocks; the first block has this stride in time and space."""
    shortcut = None
    if stride != 1 or in_channels != channels:
        shortcut = nn.Sequential(
            conv(in_channels, channels, (1, 1, 1), (stride, stride, stride)), nn.BatchNorm3d(channels)
        )
    first = BasicBlock(in_channels, channels, Conv2Plus1D, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(channels, channels, Conv2Plus1D) for _ in range(blocks - 1)))


def r2plus1d(num_classes: int, *, width: int = 64, depth: int = 18, dropout: float = 0.0) -> R2Plus1D:
    """R(2+1)D of basic blocks with 18 or 34 layers; `width` is the number of channels of the stem."""
    if depth not in BASIC_BLOCKS:
        raise UserError(f"there is no R(2+1)D of depth {depth}: choose one of {sorted(BASIC_BLOCKS)}")
    return R2Plus1D(num_classes, BASIC_BLOCKS[depth], width=width, dropout=dropout)


class R2Plus1DBottleneck(nn.Module):
    """PyTorchVideo's R(2+1)D: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w."""

    def __init__(self, num_classes: int, *, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise UserError(f"there is no R(2+1)D of depth {depth}: choose one of {sorted(BLOCKS)}")
        self.trunk = nn.Sequential(OrderedDict(stem=Stem(width, 1, pool=False)))
        channels, inner = width, width
        for stage, blocks in enumerate(BLOCKS[depth]):
            stride = (1 if stage < 2 else 2, 2, 2)
            self.trunk.add_module(f"res{stage + 2}", factored_stage(channels, inner, blocks, stride))
            channels, inner = inner * EXPANSION, inner * 2
        self.head = Head(channels, num_classes, dropout)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, t, h, w]` → `[n, classes]`."""
        return self.head(self.trunk(x))


def factored_stage(in_channels: int, inner: int, blocks: int, stride: Triple) -> nn.Sequential:
    """Return a stage of bottlenecks whose middle convolution is 3×1×1 then 1×3×3; the first block has this stride."""
    stage = nn.Sequential()
    for i in range(blocks):
        t, h, w = stride if i == 0 else (1, 1, 1)
        factored = nn.Sequential(
            OrderedDict(
                conv_t=conv(inner, inner, (3, 1, 1), (t, 1, 1)),
                bn=nn.BatchNorm3d(inner),
                relu=nn.ReLU(inplace=True),
                conv_xy=conv(inner, inner, (1, 3, 3), (1, h, w)),
            )
        )
        stage.add_module(f"block{i}", Bottleneck(in_channels, inner, stride=(t, h, w), conv_b=factored))
        in_channels = inner * EXPANSION
    return stage


def r2plus1d_bottleneck(
    num_classes: int, *, width: int = 64, depth: int = 50, dropout: float = 0.5
) -> R2Plus1DBottleneck:
    """R(2+1)D of bottlenecks with 50 or 101 layers; `width` is the number of channels of the stem."""
    return R2Plus1DBottleneck(num_classes, width=width, depth=depth, dropout=dropout)
