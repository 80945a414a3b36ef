"""Residual networks with one pathway: C2D, Slow, I3D, and I3D with non-local blocks.

C2D and I3D follow Wang et al. (arXiv 1711.07971), Slow follows Feichtenhofer et al. (arXiv 1812.03982), all as
published in PySlowFast. They differ in the position of their temporal kernels. C2D and I3D halve the number of frames
after res2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .resnet import Head, Kernels, Pathway, init_weights, temporal_kernels


class ResNet3d(nn.Module):
    """One pathway and a head: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w.

    `stem_kernel` is the temporal kernel of the stem, `kernels` those of every block, by stage. `temporal_pool` halves
    the number of frames after res2. The other arguments are those of `i3d`.
    """

    def __init__(
        self,
        num_classes: int,
        stem_kernel: int,
        kernels: Kernels,
        *,
        width: int,
        dropout: float,
        temporal_pool: bool,
        nonlocal_blocks: Mapping[str, Sequence[int]] | None = None,
        nonlocal_mode: str = "softmax",
    ) -> None:
        super().__init__()
        self.trunk = Pathway(
            width,
            stem_kernel,
            kernels,
            temporal_pool=temporal_pool,
            nonlocal_blocks=nonlocal_blocks,
            nonlocal_mode=nonlocal_mode,
        )
        self.head = Head(self.trunk.channels, num_classes, dropout)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, t, h, w]` → `[n, classes]`."""
        return self.head(self.trunk(x))


def c2d(num_classes: int, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> ResNet3d:
    """C2D: an image network applied to each frame, with one max pooling over pairs of frames."""
    kernels = temporal_kernels(depth, ((1,), (1,), (1,), (1,)))
    return ResNet3d(num_classes, 1, kernels, width=width, dropout=dropout, temporal_pool=True)


def slow(num_classes: int, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> ResNet3d:
    """Slow: the slow pathway of SlowFast alone, with temporal kernels only in res4 and res5."""
    kernels = temporal_kernels(depth, ((1,), (1,), (3,), (3,)))
    return ResNet3d(num_classes, 1, kernels, width=width, dropout=dropout, temporal_pool=False)


def i3d(
    num_classes: int,
    *,
    width: int = 64,
    depth: int = 50,
    dropout: float = 0.5,
    nonlocal_blocks: Mapping[str, Sequence[int]] | None = None,
    nonlocal_mode: str = "softmax",
) -> ResNet3d:
    """I3D: temporal kernels in the stem, in every block of res2 and in every second block of the later stages.

    Args:
        num_classes: the number of logits.
        width: channels of the stem.
        depth: 50 or 101.
        dropout: probability before the last linear layer.
        nonlocal_blocks: for each stage, the indices of the blocks that a non-local block follows: `{"res3": [1, 3]}`.
        nonlocal_mode: `softmax` or `dot_product`.
    """
    return ResNet3d(
        num_classes,
        5,
        temporal_kernels(depth, ((3,), (3, 1), (3, 1), (1, 3))),
        width=width,
        dropout=dropout,
        temporal_pool=True,
        nonlocal_blocks=nonlocal_blocks,
        nonlocal_mode=nonlocal_mode,
    )
