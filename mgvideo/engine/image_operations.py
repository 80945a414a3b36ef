"""The image operations of RandAugment, with the ranges of timm's increasing set, on uint8 frames `[t, 3, h, w]`.

Each operation takes one argument that is the same for all frames of a clip. Statistics (mean, histogram) are those of
each frame, as in PySlowFast. All arguments are Python numbers, so that no operation waits for a GPU.

Source of operations and ranges: timm's `auto_augment.py` with `inc1`, of which PySlowFast's `rand_augment.py` is a copy
(the increasing set of 15 operations, each with probability 1/2), after Cubuk et al., arXiv 1909.13719.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

MAX_LEVEL = 10.0  # of the magnitude
SOLARIZE_ADD_THRESHOLD = 128


def affine(frames: Tensor, matrix: tuple[float, float, float, float, float, float], fill: Tensor) -> Tensor:
    """Apply a geometric transformation, bilinear.

    Args:
        frames: uint8 `[t, 3, h, w]`.
        matrix: (a, b, c, d, e, f) as in PIL: the output pixel with its centre at (x, y) shows the input at
            (ax + by + c, dx + ey + f), in pixels from the upper left corner.
        fill: float `[3]`, the colour outside of the input, in 0–255.
    """
    t, channels, height, width = frames.shape
    a, b, c, d, e, f = matrix
    x = torch.arange(width, device=frames.device) + 0.5
    y = torch.arange(height, device=frames.device)[:, None] + 0.5
    grid = torch.stack(((a * x + b * y + c) * (2 / width) - 1, (d * x + e * y + f) * (2 / height) - 1), dim=-1)
    # Frames become channels, so that a pixel's place is computed once for all of them.
    pixels = (frames.float() - fill[:, None, None]).reshape(1, t * channels, height, width)
    moved = F.grid_sample(pixels, grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved.view(t, channels, height, width) + fill[:, None, None]).round_().clamp_(0, 255).to(torch.uint8)


def rotation_matrix(degrees: float, height: int, width: int) -> tuple[float, float, float, float, float, float]:
    """Return the matrix for `affine` that rotates counter-clockwise about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


def adjust_sharpness(frames: Tensor, factor: float) -> Tensor:
    """Blend frames with smoothed ones: 0 is smooth, 1 unchanged, above 1 sharper; the border stays as it is.

    torchvision's version copies its kernel from the host, for which a GPU would have to be waited for.
    """
    if min(frames.shape[-2:]) < 3:
        return frames
    sharp = frames.float()
    inner = sharp[..., 1:-1, 1:-1]
    smooth = ((9 * F.avg_pool2d(sharp, 3, stride=1) + 4 * inner) / 13).round_()  # kernel 1 1 1 / 1 5 1 / 1 1 1
    inner.add_(smooth.sub_(inner), alpha=1 - factor)
    return sharp.round_().clamp_(0, 255).to(torch.uint8)


def solarize(frames: Tensor, threshold: float) -> Tensor:
    """Invert the values from the threshold up."""
    return torch.where(frames >= threshold, 255 - frames, frames)


def solarize_add(frames: Tensor, amount: int) -> Tensor:
    """Add to the values below 128."""
    return torch.where(frames < SOLARIZE_ADD_THRESHOLD, frames.clamp(max=255 - amount) + amount, frames)


class Operation(NamedTuple):
    """An operation of RandAugment.

    Attributes:
        apply: `(frames, argument, fill)` → frames, uint8 `[t, 3, h, w]`; `fill` is the colour outside of the frame.
        argument: level in 0–10 → argument.
        signed: whether a random sign multiplies the level.
    """

    apply: Callable[[Tensor, float, Tensor], Tensor]
    argument: Callable[[float], float] = float
    signed: bool = False


def _enhancement(level: float) -> float:
    return 1 + 0.9 * level / MAX_LEVEL


def _shift(frames: Tensor, x: float, y: float, fill: Tensor) -> Tensor:
    return affine(frames, (1, 0, x * frames.shape[-1], 0, 1, y * frames.shape[-2]), fill)


def _rotate(frames: Tensor, degrees: float, fill: Tensor) -> Tensor:
    return affine(frames, rotation_matrix(degrees, *frames.shape[-2:]), fill)


OPERATIONS: dict[str, Operation] = {
    "autocontrast": Operation(lambda frames, _, fill: tv.autocontrast(frames)),
    "equalize": Operation(lambda frames, _, fill: tv.equalize(frames)),
    "invert": Operation(lambda frames, _, fill: tv.invert(frames)),
    "rotate": Operation(_rotate, lambda level: 30 * level / MAX_LEVEL, signed=True),  # degrees
    "posterize": Operation(
        lambda frames, bits, fill: tv.posterize(frames, int(bits)), lambda level: 4 - int(4 * level / MAX_LEVEL)
    ),
    "solarize": Operation(
        lambda frames, threshold, fill: solarize(frames, threshold), lambda level: 256 - int(256 * level / MAX_LEVEL)
    ),
    "solarize_add": Operation(
        lambda frames, amount, fill: solarize_add(frames, int(amount)), lambda level: int(110 * level / MAX_LEVEL)
    ),
    "color": Operation(lambda frames, factor, fill: tv.adjust_saturation(frames, factor), _enhancement, signed=True),
    "contrast": Operation(lambda frames, factor, fill: tv.adjust_contrast(frames, factor), _enhancement, signed=True),
    "brightness": Operation(
        lambda frames, factor, fill: tv.adjust_brightness(frames, factor), _enhancement, signed=True
    ),
    "sharpness": Operation(lambda frames, factor, fill: adjust_sharpness(frames, factor), _enhancement, signed=True),
    "shear_x": Operation(
        lambda frames, factor, fill: affine(frames, (1, factor, 0, 0, 1, 0), fill),
        lambda level: 0.3 * level / MAX_LEVEL,
        signed=True,
    ),
    "shear_y": Operation(
        lambda frames, factor, fill: affine(frames, (1, 0, 0, factor, 1, 0), fill),
        lambda level: 0.3 * level / MAX_LEVEL,
        signed=True,
    ),
    "translate_x": Operation(  # a fraction of the width
        lambda frames, part, fill: _shift(frames, part, 0, fill), lambda level: 0.45 * level / MAX_LEVEL, signed=True
    ),
    "translate_y": Operation(
        lambda frames, part, fill: _shift(frames, 0, part, fill), lambda level: 0.45 * level / MAX_LEVEL, signed=True
    ),
}
