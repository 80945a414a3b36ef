"""Activation checkpointing changes memory only: gradients, running statistics and random draws stay the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import build_narrow

from mgvideo.engine.micro_batches import clips_that_fit
from mgvideo.engine.precision import choose_precision
from mgvideo.layers.batchnorm import convert_group_batchnorm, deferred_running_stats, set_bn_groups
from mgvideo.layers.dropout import convert_clip_dropout, dropout_for_clips
from mgvideo.plan.plan import Grid

pytestmark = pytest.mark.numeric

NETWORKS = {
    "x3d_small": {},
    "mvit_small": {"drop_path": 0.5},
    "swin3d_t": {"drop_path": 0.5, "depths": [1, 2]},
    "vit_small": {"drop_path": 0.5},
}
FP32 = choose_precision("fp32", torch.device("cpu"))


def build_converted(name: str, **keys: object) -> nn.Module:
    torch.manual_seed(0)
    return FP32.place(convert_clip_dropout(convert_group_batchnorm(build_narrow(name, **keys)))).train()


def step(model: nn.Module, deferred: bool) -> dict[str, Tensor]:
    """Return gradients and buffers after a backward pass of clips 2 to 6 of a batch of eight, in two BN groups."""
    set_bn_groups(model, 2 if deferred else 1)
    clips = torch.randn(4, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    with dropout_for_clips(model, 8, 2, 6):
        if deferred:
            with deferred_running_stats(model):
                model(clips).square().sum().backward()
        else:
            model(clips).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**gradients, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


@pytest.mark.parametrize("deferred", [True, False], ids=["as in a run", "without the trainer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_same_to_the_last_bit(name: str, deferred: bool) -> None:
    plain, checkpointed = (
        step(build_converted(name, checkpointing=value, **NETWORKS[name]), deferred) for value in (False, True)
    )
    assert plain.keys() == checkpointed.keys()
    assert [key for key, tensor in plain.items() if not torch.equal(tensor, checkpointed[key])] == []


def test_blocks_save_only_their_inputs_and_more_clips_fit() -> None:
    grid = Grid(4, 48, (1, 1), (48, 48))
    plain, checkpointed = (build_converted("vit_s", checkpointing=value) for value in (False, True))
    counts = [clips_that_fit(model, grid, FP32, 2**28) for model in (plain, checkpointed)]
    tokens, width, blocks = 2 * 3 * 3, 96, 12
    inputs = 4 * tokens * width * blocks
    assert 0.6 * 2**28 / counts[1] > inputs, "the inputs of all blocks, and the largest block besides"
    assert counts[1] > 2.5 * counts[0]
    assert all(block.recompute for block in checkpointed.blocks), "the network itself is unchanged"
