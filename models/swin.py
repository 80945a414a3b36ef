"""Video Swin: attention in windows that shift from block to block (Liu et al., CVPR 2022, arXiv 2106.13230).

The networks are torchvision's, with its parameter names. It pads feature maps to whole windows. Where a map is smaller
than the window of 8 × 7 × 7, the window shrinks to the map and does not shift (arXiv 2106.13230, as in the authors'
get_window_size).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.swin_transformer import PatchMerging
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

from mgvideo.errors import UserError

from .blocks import depths_of_parameters, run_block, set_recompute

PATCH, WINDOW = (2, 4, 4), (8, 7, 7)  # frames, height, width


class WindowAttention(ShiftedWindowAttention3d):
    """torchvision's attention, whose position biases keep their meaning in windows that shrink to a small map.

    torchvision takes the first rows of its index there. That is right if only the frames are fewer. If a map is lower
    or narrower than the window, its biases would belong to other offsets than on larger grids.
    """

    def get_relative_position_bias(self, window_size: list[int]) -> Tensor:
        """Return the biases `[1, heads, tokens, tokens]` of a window."""
        t, h, w = window_size
        tokens = t * h * w
        index = self.relative_position_index.view(*self.window_size, *self.window_size)
        index = index[:t, :h, :w, :t, :h, :w].flatten()
        return self.relative_position_bias_table[index].view(tokens, tokens, -1).permute(2, 0, 1)[None]


class Swin3D(SwinTransformer3d):
    """Video Swin: float `[n, 3, t, h, w]` → logits `[n, classes]`, for any t, h, w. Arguments as of `swin3d`.

    Attributes:
        no_weight_decay: patterns of `fnmatch` for parameters without weight decay, besides norms and biases.
    """

    no_weight_decay = ("*.relative_position_bias_table",)

    def __init__(
        self,
        num_classes: int,
        *,
        width: int,
        depths: Sequence[int],
        head_width: int,
        dropout: float,
        drop_path: float,
        checkpointing: bool,
    ) -> None:
        heads = width // head_width
        if heads < 1 or width % head_width:
            raise UserError(f"Swin: width {width} must be a multiple of head_width {head_width}")
        super().__init__(
            patch_size=list(PATCH),
            embed_dim=width,
            depths=list(depths),
            num_heads=[heads * 2**stage for stage in range(len(depths))],
            window_size=list(WINDOW),
            stochastic_depth_prob=drop_path,
            num_classes=num_classes,
        )
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if type(module) is ShiftedWindowAttention3d:
                module.__class__ = WindowAttention
        set_recompute(self._blocks(), checkpointing)

    def _blocks(self) -> list[nn.Module]:
        """Return the transformer blocks and the patch mergings, in their order."""
        return [block for part in self.features for block in (part if isinstance(part, nn.Sequential) else [part])]

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 3, t, h, w]` → `[n, classes]`."""
        x = self.patch_embed(x)  # [n, t / 2, h / 4, w / 4, c]
        for block in self._blocks():
            x = run_block(block, x)
        x = self.norm(x).movedim(-1, 1)
        return self.head(self.dropout(self.avgpool(x).flatten(1)))

    def parameter_depths(self) -> dict[str, int]:
        """Return the depth of each parameter: 0 for the embedding, 1 for the first block, …; the head is the deepest.

        A patch merging has the depth of the block before it.
        """
        blocks: list[list[nn.Module]] = []
        for block in self._blocks():
            if isinstance(block, PatchMerging):
                blocks[-1].append(block)
            else:
                blocks.append([block])
        return depths_of_parameters(self, [self.patch_embed], blocks)


def swin3d(
    num_classes: int,
    *,
    width: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    head_width: int = 32,
    dropout: float = 0.0,
    drop_path: float = 0.1,
    checkpointing: bool = False,
) -> Swin3D:
    """Video Swin as in torchvision. T has width 96 and depths 2, 2, 6, 2; S 2, 2, 18, 2; B the same and width 128.

    Args:
        num_classes: the number of logits.
        width: channels of the first stage; each later stage doubles them.
        depths: number of blocks of each stage.
        head_width: channels of an attention head.
        dropout: probability before the last linear layer.
        drop_path: probability to drop a branch of the last block; it rises linearly from 0 in the first.
        checkpointing: save only the inputs of the blocks, and run them again in backward.
    """
    return Swin3D(
        num_classes,
        width=width,
        depths=depths,
        head_width=head_width,
        dropout=dropout,
        drop_path=drop_path,
        checkpointing=checkpointing,
    )
