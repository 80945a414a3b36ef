"""The single-pathway residual networks: C2D, Slow and I3D, the latter also with non-local blocks.

C2D and I3D after Wang et al. (arXiv 1711.07971), Slow after Feichtenhofer et al. (arXiv 1812.03982), as PySlowFast
publishes them: they differ in where their temporal kernels are, and C2D and I3D halve the frames after res2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .resnet import Head, Kernels, Pathway, init_weights, temporal_kernels


class ResNet3d(nn.Module):
    """One pathway and a head: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w.

    `kernels` gives every block's temporal kernel, stage by stage; the other arguments are as in `i3d`.
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
    """C2D: an image network on frames, but for one max pooling over pairs of them."""
    kernels = temporal_kernels(depth, ((1,), (1,), (1,), (1,)))
    return ResNet3d(num_classes, 1, kernels, width=width, dropout=dropout, temporal_pool=True)


def slow(num_classes: int, *, width: int = 64, depth: int = 50, dropout: float = 0.5) -> ResNet3d:
    """Slow: the slow pathway of SlowFast alone, temporal in res4 and res5 only."""
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
    """I3D: temporal kernels in the stem, in all of res2 and in every other block after it.

    `width` is the stem's channels. `nonlocal_blocks` names the blocks of a stage that a non-local block follows, as in
    `{"res3": [1, 3]}`; `nonlocal_mode` is `softmax` or `dot_product`.
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
