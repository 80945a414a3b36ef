"""How far a result may be from the exact one: what rounding explains, from the dtype and the number of terms added."""

from __future__ import annotations

import math

import pytest
import torch

from mgvideo.engine.precision import cpu_has_bf16

needs_bf16 = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU has no bf16 instructions")


def rounding_error(dtype: torch.dtype, terms: int = 1, layers: int = 1) -> float:
    """Largest relative error, in the 2-norm, of sums of products in `dtype`, after a number of layers of them.

    Rounding is off by at most eps / 2, uniformly, and the values that it is relative to are 1.47 powers of two in the
    root mean square: 0.2 eps. Errors are independent, so their squares add: three of operands and result, and one of
    each partial sum, relative to which the sums are half as large in the mean square. One half is added to the whole,
    since tensors are small. `terms` counts additions in `dtype` itself: matrix products in bf16 instructions add in
    float32.
    """
    return 1.5 * 0.2 * torch.finfo(dtype).eps * math.sqrt(layers * (3 + terms / 2))
