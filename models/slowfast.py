"""SlowFast: a wide pathway on few frames and a narrow one on all frames (Feichtenhofer et al., arXiv 1812.03982)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mgvideo.errors import UserError

from .resnet import EXPANSION, Head, Kernels, Pathway, conv, init_weights, temporal_kernels

FUSION_RATIO = 2  # output channels of a lateral connection, as a multiple of the fast pathway's


@torch.compiler.assume_constant_result
def slow_indices(frames: int, alpha: int) -> tuple[int, ...]:
    """Return the indices of the slow pathway's frames: `frames // alpha` (at least 1), evenly spaced, truncated.

    As published, computed in float32 on the CPU. For some lengths, exact arithmetic would give a neighbouring frame.
    """
    return tuple(torch.linspace(0, frames - 1, max(1, frames // alpha)).long().tolist())


class Fusion(nn.Sequential):
    """Lateral connection from the fast to the slow pathway: a temporal convolution with stride `alpha`."""

    def __init__(self, channels: int, kernel: int, alpha: int) -> None:
        super().__init__(
            OrderedDict(
                conv=conv(channels, channels * FUSION_RATIO, (kernel, 1, 1), (alpha, 1, 1)),
                bn=nn.BatchNorm3d(channels * FUSION_RATIO),
                relu=nn.ReLU(inplace=True),
            )
        )


class SlowFast(nn.Module):
    """SlowFast: float `[n, 3, t, h, w]` with the fast pathway's frames → logits `[n, classes]`, for any t, h, w.

    `slow_kernels` and `fast_kernels` are the temporal kernels of every block, by stage. The other arguments are
    those of `slowfast`.
    """

    def __init__(
        self,
        num_classes: int,
        slow_kernels: Kernels,
        fast_kernels: Kernels,
        *,
        width: int,
        dropout: float,
        alpha: int,
        beta_inv: int,
        fusion_kernel: int,
        nonlocal_blocks: Mapping[str, Sequence[int]] | None = None,
        nonlocal_mode: str = "dot_product",
    ) -> None:
        super().__init__()
        if width % beta_inv:
            raise UserError(f"width {width} is not divisible by beta_inv {beta_inv}: choose a multiple of {beta_inv}")
        self.alpha = alpha
        narrow = width // beta_inv
        # Channels of the fast pathway at each lateral connection: after the stem, then after every stage but the last.
        fast_channels = [narrow, *(narrow * EXPANSION * 2**i for i in range(len(fast_kernels) - 1))]
        self.slow = Pathway(
            width,
            1,
            slow_kernels,
            lateral=[channels * FUSION_RATIO for channels in fast_channels],
            nonlocal_blocks=nonlocal_blocks,
            nonlocal_mode=nonlocal_mode,
        )
        self.fast = Pathway(narrow, 5, fast_kernels)
        self.fusions = nn.ModuleList(Fusion(channels, fusion_kernel, alpha) for channels in fast_channels)
        self.head = Head(self.slow.channels + self.fast.channels, num_classes, dropout)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, t, h, w]` → `[n, classes]`."""
        # Slices, because an index tensor would have to be copied to the device, which would synchronise it.
        frames = x.split(1, dim=2)
        slow = torch.cat([frames[i] for i in slow_indices(len(frames), self.alpha)], dim=2)
        slow, fast = self.slow.stem(slow), self.fast.stem(x)
        for fusion, slow_stage, fast_stage in zip(self.fusions, self.slow.stages(), self.fast.stages(), strict=True):
            # If alpha does not divide the number of frames, `fusion` returns one time step too many.
            lateral = fusion(fast)[:, :, : slow.shape[2]]
            slow, fast = slow_stage(torch.cat([slow, lateral], dim=1)), fast_stage(fast)
        return self.head(slow, fast)


def slowfast(
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 50,
    temporal_depth: int | None = None,
    dropout: float = 0.5,
    alpha: int = 4,
    beta_inv: int = 8,
    fusion_kernel: int = 7,
    nonlocal_blocks: Mapping[str, Sequence[int]] | None = None,
    nonlocal_mode: str = "dot_product",
) -> SlowFast:
    """SlowFast as published.

    Args:
        num_classes: the number of logits.
        width: channels of the slow pathway's stem.
        depth: 50 or 101.
        temporal_depth: give a stage only as many temporal blocks as a network of this depth has; None: `depth`.
        dropout: probability before the last linear layer.
        alpha: the fast pathway has this many times the slow pathway's frames.
        beta_inv: the fast pathway has 1/`beta_inv` of the slow pathway's channels.
        fusion_kernel: temporal kernel of the lateral connections.
        nonlocal_blocks: for each stage of the slow pathway, the indices of the blocks that a non-local block follows:
            `{"res3": [1, 3]}`.
        nonlocal_mode: `softmax` or `dot_product`.
    """
    return SlowFast(
        num_classes,
        temporal_kernels(depth, ((1,), (1,), (3,), (3,)), temporal_depth),
        temporal_kernels(depth, ((3,), (3,), (3,), (3,)), temporal_depth),
        width=width,
        dropout=dropout,
        alpha=alpha,
        beta_inv=beta_inv,
        fusion_kernel=fusion_kernel,
        nonlocal_blocks=nonlocal_blocks,
        nonlocal_mode=nonlocal_mode,
    )
