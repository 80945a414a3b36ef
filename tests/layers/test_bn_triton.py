"""Batch norm of groups in Triton against float64, in Triton's interpreter on the CPU. On a GPU, tests/gpu runs it.

Triton reads TRITON_INTERPRET when it is imported. So the first test runs the others in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

# relative errors of output and gradient of the input, which are rounded to the dtype; other gradients are float32
MAX_ERROR = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 5e-4}
# [clips, channels, t · h, w] and groups: rows and channels that fill no tile; several splits of the rows of a group
SHAPES = [(3, 24, 20, 9, 3), (2, 64, 15, 9, 1), (2, 130, 14, 7, 2), (2, 8, 300, 20, 1)]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.fixture
def kernels() -> ModuleType:
    from mgvideo.layers import bn_triton

    return bn_triton


def random_clips(shape: tuple[int, ...], dtype: torch.dtype, mean: float) -> Tensor:
    return (3 * torch.randn(shape) + mean).to(dtype).to(memory_format=torch.channels_last)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


@interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[0], dtype) for dtype in MAX_ERROR)]
)
def test_kernels_equal_float64(shape: tuple[int, ...], dtype: torch.dtype, kernels: ModuleType) -> None:
    n, channels, height, width, groups = shape
    torch.manual_seed(0)
    x, dy = (random_clips((n, channels, height, width), dtype, mean) for mean in (5, 0))
    inputs = [x.requires_grad_(), torch.rand(channels).requires_grad_(), torch.randn(channels).requires_grad_()]
    assert kernels.can_normalise(x, groups)
    y, mean, invstd = kernels.TritonGroupNormalise.apply(*inputs, groups, 1e-5)
    gradients = torch.autograd.grad(y, inputs, dy)

    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    chunks = doubles[0].chunk(groups)
    expected = torch.cat([F.batch_norm(chunk, None, None, *doubles[1:], training=True) for chunk in chunks])
    expected_gradients = torch.autograd.grad(expected, doubles, dy.double())
    assert error(y, expected) < MAX_ERROR[dtype]
    assert error(gradients[0], expected_gradients[0]) < MAX_ERROR[dtype]
    assert max(map(error, gradients[1:], expected_gradients[1:])) < 1e-5
    assert error(mean, torch.stack([chunk.mean((0, 2, 3)) for chunk in chunks])) < 1e-6
    variances = torch.stack([chunk.var((0, 2, 3), correction=0) for chunk in chunks])
    assert error(invstd, (variances + 1e-5).rsqrt()) < 1e-6


@interpreted
def test_without_affine_parameters(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    x, dy = (random_clips((4, 16, 6, 5), torch.float32, mean) for mean in (5, 0))
    x.requires_grad_()
    y, *_ = kernels.TritonGroupNormalise.apply(x, None, None, 2, 1e-5)
    double = x.detach().double().requires_grad_()
    expected = torch.cat([F.batch_norm(chunk, None, None, training=True) for chunk in double.chunk(2)])
    assert error(y, expected) < 1e-6
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad(y, x, dy),
        torch.autograd.grad(expected, double, dy.double()),
    )
    assert error(gradient, expected_gradient) < 1e-6


@interpreted
def test_other_layouts_and_dtypes_are_left_to_other_kernels(kernels: ModuleType) -> None:
    clips = torch.randn(2, 4, 6, 5)
    assert not kernels.can_normalise(clips, 1)
    assert not kernels.can_normalise(clips.double().to(memory_format=torch.channels_last), 1)
