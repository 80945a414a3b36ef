"""Parts that the residual video networks share: stem, bottleneck stages, head and initialisation.

The design is that of He et al. (arXiv 1512.03385) in the 3D form of Feichtenhofer et al. (arXiv 1812.03982). The stride
is on the 3×3 convolution, every convolution pads by half its kernel, and batch norm has eps 1e-5 and momentum 0.1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from mgvideo.errors import UserError

from .nonlocal_block import NonLocal
from .pooling import MaxPool, TemporalPool

EXPANSION = 4  # output channels of a bottleneck, as a multiple of its inner channels
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # depth → blocks in res2 … res5

Triple = tuple[int, int, int]  # time, height, width
# temporal kernel of the first convolution of every block, by stage
Kernels = Sequence[Sequence[int]]


def temporal_kernels(depth: int, cycles: Kernels, temporal_depth: int | None = None) -> Kernels:
    """Return the temporal kernels of a network of this depth: the blocks of a stage repeat that stage's cycle.

    With `temporal_depth`, a stage has only as many temporal blocks as a network of that depth has blocks there. Its
    other blocks have kernel 1. Raises `UserError` for an unknown depth.
    """
    for value in (depth, temporal_depth or depth):
        if value not in BLOCKS:
            raise UserError(f"there is no network of depth {value}: choose one of {sorted(BLOCKS)}")
    limits = BLOCKS[temporal_depth or depth]
    return [
        [kernel if block < limit else 1 for block, kernel in enumerate(islice(cycle(kernels), blocks))]
        for kernels, blocks, limit in zip(cycles, BLOCKS[depth], limits, strict=True)
    ]


def conv(in_channels: int, channels: int, kernel: Triple, stride: Triple = (1, 1, 1), groups: int = 1) -> nn.Conv3d:
    """Return a convolution without bias, padded by half its kernel."""
    t, h, w = kernel
    return nn.Conv3d(in_channels, channels, kernel, stride, (t // 2, h // 2, w // 2), groups=groups, bias=False)


class Stem(nn.Sequential):
    """k×7×7 convolution and 3×3 max pooling, each of spatial stride 2: a quarter of height and width, all frames."""

    def __init__(self, channels: int, temporal_kernel: int, *, pool: bool = True) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=conv(3, channels, (temporal_kernel, 7, 7), (1, 2, 2)),
            bn=nn.BatchNorm3d(channels),
            relu=nn.ReLU(inplace=True),
        )
        if pool:
            layers["pool"] = MaxPool((1, 3, 3), (1, 2, 2), (0, 1, 1))
        super().__init__(layers)


class Bottleneck(nn.Module):
    """k×1×1, 1×3×3 and 1×1×1 convolutions with a shortcut; `[n, c, t, h, w]` → `[n, 4 · inner, t / st, h / s, w / s]`.

    `conv_b` replaces the 1×3×3 convolution and must have the same stride.
    """

    def __init__(
        self,
        in_channels: int,
        inner: int,
        kernel: int = 1,
        stride: Triple = (1, 1, 1),
        conv_b: nn.Module | None = None,
    ) -> None:
        super().__init__()
        channels = inner * EXPANSION
        self.conv_a = conv(in_channels, inner, (kernel, 1, 1))
        self.bn_a = nn.BatchNorm3d(inner)
        self.conv_b = conv_b or conv(inner, inner, (1, 3, 3), stride)
        self.bn_b = nn.BatchNorm3d(inner)
        self.conv_c = conv(inner, channels, (1, 1, 1))
        self.bn_c = nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.projects = in_channels != channels or stride != (1, 1, 1)
        if self.projects:
            self.shortcut = conv(in_channels, channels, (1, 1, 1), stride)
            self.shortcut_bn = nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, 4 · inner, t', h', w']`."""
        branch = self.relu(self.bn_a(self.conv_a(x)))
        branch = self.relu(self.bn_b(self.conv_b(branch)))
        branch = self.bn_c(self.conv_c(branch))
        if self.projects:
            x = self.shortcut_bn(self.shortcut(x))
        return self.relu(x + branch)


class Pathway(nn.Sequential):
    """A stem and the residual stages res2, res3, …: `[n, 3, t, h, w]` → features `[n, c, t', h', w']`.

    `lateral` is the number of channels that lateral connections add to the input of each stage. `temporal_pool` halves
    the number of frames after res2. `nonlocal_blocks` lists, for each stage, the blocks that a non-local block
    follows: `{"res3": [1, 3]}`.
    """

    stem: Stem

    def __init__(
        self,
        width: int,
        stem_kernel: int,
        kernels: Kernels,
        *,
        temporal_pool: bool = False,
        lateral: Sequence[int] | None = None,
        nonlocal_blocks: Mapping[str, Sequence[int]] | None = None,
        nonlocal_mode: str = "softmax",
    ) -> None:
        super().__init__(OrderedDict(stem=Stem(width, stem_kernel)))
        nonlocal_blocks = nonlocal_blocks or {}
        channels, inner = width, width
        for stage, blocks in enumerate(kernels):
            name = f"res{stage + 2}"
            channels += lateral[stage] if lateral else 0
            after = nonlocal_blocks.get(name, ())
            self.add_module(name, residual_stage(channels, inner, blocks, 1 if stage == 0 else 2, after, nonlocal_mode))
            if temporal_pool and stage == 0:
                self.add_module("pool", TemporalPool())
            channels, inner = inner * EXPANSION, inner * 2
        self.channels = channels

    def stages(self) -> list[nn.Module]:
        """Return all modules after the stem."""
        return list(self)[1:]


def residual_stage(
    in_channels: int, inner: int, kernels: Sequence[int], stride: int, nonlocal_after: Sequence[int], nonlocal_mode: str
) -> nn.Sequential:
    """Return a stage of bottlenecks with these temporal kernels.

    `stride` is the spatial stride of the first block. A non-local block follows each block of `nonlocal_after`.
    """
    stage = nn.Sequential()
    for i, kernel in enumerate(kernels):
        block = Bottleneck(in_channels, inner, kernel, (1, stride, stride) if i == 0 else (1, 1, 1))
        stage.add_module(f"block{i}", block)
        in_channels = inner * EXPANSION
        if i in nonlocal_after:
            stage.add_module(f"nonlocal{i}", NonLocal(in_channels, nonlocal_mode))
    return stage


class Head(nn.Module):
    """Averages each pathway over all of its positions, then applies dropout and one linear layer."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, *pathways: Tensor) -> Tensor:
        """Features `[n, c, t, h, w]`, one for each pathway → logits `[n, classes]`."""
        pooled = torch.cat([features.mean((2, 3, 4)) for features in pathways], dim=1)
        return self.fc(self.dropout(pooled))


def init_weights(model: nn.Module) -> None:
    """Initialise a network in place as published.

    Convolutions: He's normal by fan-out. Linear layers: normal with std 0.01, zero bias. Batch norm at the end of every
    residual branch: zero weight.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn_c.weight)
        elif isinstance(module, NonLocal):
            nn.init.zeros_(module.bn.weight)
