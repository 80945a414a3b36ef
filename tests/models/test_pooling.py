"""`max_pool` has the values and gradients of 3-D max pooling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import NAMES, build

from mgvideo.models.pooling import max_pool

LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]
WINDOWS = {
    "stem": ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    "non-local": ((1, 2, 2), None, (0, 0, 0)),
    "one row": ((1, 1, 2), None, (0, 0, 0)),
    "pairs of frames": ((2, 1, 1), None, (0, 0, 0)),
    "no pooling": ((1, 1, 1), None, (0, 0, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_3d_pooling(window: str, layout: torch.memory_format) -> None:
    kernel, stride, padding = WINDOWS[window]
    # few distinct values, so that some windows have several equal maxima; the gradient belongs to the first
    x = torch.randint(0, 4, (2, 6, 5, 9, 7), generator=torch.Generator().manual_seed(0)).float()
    x = x.to(memory_format=layout).requires_grad_()
    pooled, expected = max_pool(x, kernel, stride, padding), F.max_pool3d(x, kernel, stride, padding)
    gradient = torch.randn(expected.shape)
    assert torch.equal(pooled, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (pooled, expected)))
    assert pooled.is_contiguous(memory_format=layout)


def test_window_over_time_and_space_raises() -> None:
    with pytest.raises(ValueError, match="over time and space"):
        max_pool(torch.zeros(1, 1, 4, 4, 4), (2, 2, 2))


class RecordOperations(TorchDispatchMode):
    """Records the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("small") or name == "r2plus1d_18"])
def test_networks_use_only_operations_deterministic_on_cuda(name: str) -> None:
    with torch.device("meta"):
        model = build(name, width=12 if name == "vit_small" else 8)  # its heads share the width
        clips = torch.empty(2, 3, 8, 64, 64).to(memory_format=torch.channels_last_3d)
    with RecordOperations() as operations:
        model(clips).sum().backward()
    # the operations of video networks that torch.use_deterministic_algorithms lists as not deterministic
    not_deterministic = {
        "max_pool3d",
        "avg_pool3d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "upsample",
        "replication_pad",
    }
    assert not [n for n in operations.names if any(n.lstrip("_").startswith(bad) for bad in not_deterministic)]
