"""Tolerances of numeric tests: the rounding error to expect for a dtype and a number of added terms."""

from __future__ import annotations

import math

import pytest
import torch

from mgvideo.engine.precision import cpu_has_bf16

needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16 instructions")


def rounding_error(dtype: torch.dtype, terms: int = 1, layers: int = 1) -> float:
    """Return the largest relative error, in the 2-norm, of sums of products in `dtype`, after a number of layers.

    Rounding to a dtype has a relative error of 0.2 eps in the root mean square: the absolute error is uniform up to
    eps / 2 in units of the value's power of two, and values are 1.47 times that power in the root mean square. Errors
    are independent, so their squares add up: three for the operands and the result, and one half for each addition,
    because a partial sum has half the mean square of the final sum on average. The factor of 1.5 is a margin, because
    tensors are small.

    `terms` counts the additions in `dtype` itself. Matrix products in bf16 instructions accumulate in float32.
    """
    return 1.5 * 0.2 * torch.finfo(dtype).eps * math.sqrt(layers * (3 + terms / 2))
