"""Max pooling over space or over time, in the precision of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Sizes = int | tuple[int, int, int]


def max_pool(x: Tensor, kernel: Sizes, stride: Sizes | None = None, padding: Sizes = (0, 0, 0)) -> Tensor:
    """Max-pool `[n, c, t, h, w]` over space alone or over time alone, with the result of `F.max_pool3d`.

    It runs as 2-D pooling on a view, because on CUDA 3-D pooling is slow in channels_last_3d and its gradient is not
    deterministic. `stride` defaults to `kernel`. Raises ValueError for a window over both time and space.
    """
    (t, *window), (t_stride, *strides), (t_pad, *pads) = _triple(kernel), _triple(stride or kernel), _triple(padding)
    if (t, t_stride, t_pad) == (1, 1, 0):
        if x.is_contiguous(memory_format=torch.channels_last_3d):
            return (
                _pool(x.movedim(2, 1).flatten(0, 1), window, strides, pads).unflatten(0, (-1, x.shape[2])).movedim(1, 2)
            )
        return _pool(x.flatten(1, 2), window, strides, pads).unflatten(1, (-1, x.shape[2]))
    if (window, strides, pads) == ([1, 1], [1, 1], [0, 0]):
        return _pool(x.flatten(3), [t, 1], [t_stride, 1], [t_pad, 0]).unflatten(3, x.shape[3:])
    raise ValueError(
        f"max_pool: kernel {kernel} with stride {stride} pools over time and space: pool over one after the other"
    )


def _pool(x: Tensor, window: list[int], stride: list[int], padding: list[int]) -> Tensor:
    # Without `return_indices`, autocast on CPUs would cast to float32, which is slower and gives the same maxima.
    return F.max_pool2d(x, window, stride, padding, return_indices=True)[0]


def _triple(sizes: Sizes) -> tuple[int, int, int]:
    return (sizes, sizes, sizes) if isinstance(sizes, int) else sizes


class MaxPool(nn.MaxPool3d):
    """Applies `max_pool`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, c, t', h', w']`."""
        return max_pool(input, self.kernel_size, self.stride, self.padding)


class TemporalPool(nn.Module):
    """Max-pools pairs of frames. A single frame is unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        """`[n, c, t, h, w]` → `[n, c, t // 2, h, w]`."""
        return max_pool(x, (min(2, x.shape[2]), 1, 1))
