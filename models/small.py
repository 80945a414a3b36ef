"""Small networks for small clips: the parts of the large networks with few layers and a total spatial stride of 8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .i3d import ResNet3d
from .slowfast import SlowFast
from .x3d import X3D

if TYPE_CHECKING:
    from .mvit import MViT
    from .r2plus1d import R2Plus1D
    from .vit import VisionTransformer


def slowfast_small(num_classes: int, *, width: int = 32, dropout: float = 0.0) -> SlowFast:
    """SlowFast with two stages; the fast pathway has a quarter of the channels and four times the frames."""
    return SlowFast(
        num_classes,
        slow_kernels=((1,), (3,)),
        fast_kernels=((3,), (3,)),
        width=width,
        dropout=dropout,
        alpha=4,
        beta_inv=4,
        fusion_kernel=5,
    )


def i3d_small(num_classes: int, *, width: int = 16, dropout: float = 0.0) -> ResNet3d:
    """I3D with two stages."""
    return ResNet3d(num_classes, 5, ((3,), (3,)), width=width, dropout=dropout, temporal_pool=True)


def i3d_nln_small(num_classes: int, *, width: int = 16, dropout: float = 0.0) -> ResNet3d:
    """I3D with two stages and a non-local block after the second."""
    blocks = {"res3": [0]}
    return ResNet3d(
        num_classes, 5, ((3,), (3,)), width=width, dropout=dropout, temporal_pool=True, nonlocal_blocks=blocks
    )


def r2plus1d_small(num_classes: int, *, width: int = 16, dropout: float = 0.0) -> R2Plus1D:
    """R(2+1)D with four blocks in three stages."""
    from .r2plus1d import R2Plus1D  # imports torchvision, which takes about a second

    return R2Plus1D(num_classes, (1, 1, 2), width=width, dropout=dropout)


def x3d_small(num_classes: int, *, width: int = 16, dropout: float = 0.0, checkpointing: bool = False) -> X3D:
    """X3D with two stages of two and three blocks."""
    return X3D(
        num_classes,
        (2, 3),
        width=width,
        dropout=dropout,
        shortcut_norm=True,
        checkpointing=checkpointing,
        head_channels=16 * width,
    )


def mvit_small(
    num_classes: int, *, width: int = 32, dropout: float = 0.0, drop_path: float = 0.0, checkpointing: bool = False
) -> MViT:
    """MViTv2 with four blocks in three stages, and position tables for clips of 16 × 64².

    The initial weights are larger than the published 0.02, which is for a first stage of 96 channels and more: the
    variance of a layer's output is that of width 96.
    """
    from .mvit import INIT_STD, mvit  # imports torchvision

    return mvit(
        num_classes,
        width=width,
        depth=4,
        stages=(1, 3),
        table_frames=16,
        table_size=64,
        dropout=dropout,
        drop_path=drop_path,
        checkpointing=checkpointing,
        init_std=INIT_STD * (96 / width) ** 0.5,
    )


def vit_small(
    num_classes: int, *, width: int = 96, dropout: float = 0.0, drop_path: float = 0.0, checkpointing: bool = False
) -> VisionTransformer:
    """ViT with four blocks of three heads, and tubelets of 2 × 8 × 8.

    The initial weights are larger than the published 0.02, which is for widths of 384 and more: the variance of a
    layer's output is that of width 768.
    """
    from .vit import vit  # imports torchvision

    return vit(
        num_classes,
        width=width,
        depth=4,
        heads=3,
        patch_size=8,
        dropout=dropout,
        drop_path=drop_path,
        checkpointing=checkpointing,
        init_std=0.02 * (768 / width) ** 0.5,
    )
