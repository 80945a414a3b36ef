"""Layers on a GPU compared with the CPU: batch norm in groups, dropout masks per clip, pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mgvideo.layers.batchnorm import convert_group_batchnorm, deferred_running_stats, set_bn_groups
from mgvideo.layers.dropout import ClipDropout, dropout_for_clips
from mgvideo.models.pooling import max_pool

MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.02}  # relative; values are sums of a few thousand terms


@pytest.mark.parametrize("dtype", MAX_ERROR)
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_batch_norm_in_groups_equals_float64_on_the_cpu(
    groups: int, layout: torch.memory_format, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 16, 24, 4, 9, 9, dtype=torch.float64)
    x = 3 * x + 5  # a mean far from zero, as after a convolution

    def run(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        layer = convert_group_batchnorm(nn.BatchNorm3d(24)).to(device, torch.promote_types(dtype, torch.float32))
        set_bn_groups(layer, groups)
        clips = x.to(device, dtype, memory_format=layout).requires_grad_()
        with deferred_running_stats(layer):
            y = layer(clips)
            y.backward(gradient.to(device, dtype, memory_format=layout))
        evaluated = layer.eval()(clips)
        tensors = (y, clips.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var, evaluated)
        return [tensor.detach().double().cpu() for tensor in tensors]

    for actual, expected in zip(run(device, dtype), run(torch.device("cpu"), torch.float64), strict=True):
        assert float((actual - expected).norm() / expected.norm()) < MAX_ERROR[dtype]


def test_a_dropout_mask_does_not_depend_on_the_other_clips(device: torch.device) -> None:
    layer = ClipDropout(0.5).train().to(device)
    parent = nn.Sequential(layer, nn.Linear(1, 1)).to(device)

    def masks(start: int, stop: int) -> torch.Tensor:
        torch.manual_seed(7)
        with dropout_for_clips(parent, 12, start, stop):
            return layer(torch.ones(stop - start, 1000, device=device))

    whole = masks(0, 12)
    assert torch.equal(torch.cat([masks(0, 5), masks(5, 12)]), whole)
    assert 0.4 < float((whole > 0).float().mean()) < 0.6


def test_pooling_is_deterministic(device: torch.device) -> None:
    x = torch.randint(0, 3, (2, 8, 4, 28, 28), device=device).float()
    x = x.to(memory_format=torch.channels_last_3d).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            torch.autograd.grad(max_pool(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)).square().sum(), x)[0] for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)
