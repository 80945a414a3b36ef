"""`check_forward` refuses networks whose training would depend on ranks and micro-batches, and accepts others."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from mgvideo.engine.forward_check import check_forward
from mgvideo.errors import UserError
from mgvideo.layers.batchnorm import convert_group_batchnorm
from mgvideo.layers.dropout import convert_clip_dropout
from mgvideo.models.small import i3d_nln_small, slowfast_small
from mgvideo.plan.plan import Grid

GRID = Grid(4, 16, (1, 1), (16, 16))


class Block(nn.Module):
    """A convolution, then a function of its output `[n, 4, t, h, w]`."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv3d(3, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class RunningMean(nn.Module):
    """A layer that keeps a running mean of its inputs in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3, 4))
        return x - self.mean.view(-1, 1, 1, 1)


class SizedTable(nn.Module):
    """A layer that replaces its table by one of the clip's size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape != x.shape[2:]:
            self.table = torch.ones(x.shape[2:])
        return x + self.table


def to_tokens(x: Tensor) -> Tensor:
    """Reshape `[n, channels, t, h, w]` to `[n, positions, channels]`."""
    return x.flatten(2).transpose(1, 2)


def attend(x: Tensor, dropout: float) -> Tensor:
    heads = to_tokens(x)[:, None]
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropout)


def check(model: nn.Module) -> None:
    check_forward(convert_clip_dropout(convert_group_batchnorm(model)), GRID, torch.device("cpu"))


RANDOM = "draws random numbers"
FAULTS = {  # layers of which the last is at fault, and a part of the message
    "dropout": ([Block(lambda x: F.dropout(x, 0.1))], RANDOM),
    "dropout3d": ([Block(lambda x: F.dropout3d(x, 0.1))], RANDOM),
    "drop path": ([Block(lambda x: x * torch.empty(len(x), 1, 1, 1, 1).bernoulli_(0.9))], RANDOM),
    "drop path of rand": ([Block(lambda x: x * (torch.rand(len(x), 1, 1, 1, 1) + 0.9).floor())], RANDOM),
    "own generator": ([Block(lambda x: x + torch.rand(4, 1, 1, 1, generator=torch.Generator()))], RANDOM),
    "attention": ([Block(lambda x: attend(x, 0.1))], RANDOM),
    "noise": ([Block(lambda x: x + torch.randn_like(x))], RANDOM),
    "rrelu": ([Block(lambda x: F.rrelu(x, training=True))], RANDOM),
    "pooling": ([nn.Conv3d(3, 4, 1), nn.FractionalMaxPool3d(2, output_size=2)], RANDOM),
    "python": ([Block(lambda x: x if random.random() < 0.9 else 0 * x)], "of Python or NumPy"),
    "numpy": ([Block(lambda x: x if np.random.rand() < 0.9 else 0 * x)], "of Python or NumPy"),
    "batch norm": ([Block(lambda x: F.batch_norm(x, None, None, training=True))], "statistics of a micro-batch"),
    "buffer": ([nn.Conv3d(3, 4, 1), RunningMean()], "changes its buffer mean"),
    "tokens first": ([Block(lambda x: to_tokens(x).transpose(0, 1)), nn.Dropout(0.1)], "for 5 clips"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_message_names_a_layer_that_depends_on_ranks(fault: str) -> None:
    layers, message = FAULTS[fault]
    with pytest.raises(UserError) as error:
        check(nn.Sequential(*layers))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"model: {len(layers) - 1} (")
    assert message in line


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Dropout(0.1), nn.Dropout3d(0.1), StochasticDepth(0.1, "row")],
        [nn.Conv3d(3, 4, 1), nn.InstanceNorm3d(4), nn.GroupNorm(2, 4), nn.LayerNorm(16)],
        [Block(lambda x: F.instance_norm(x)), SizedTable()],
        [
            Block(
                lambda x: F.conv3d(x, F.batch_norm(torch.ones(1, 4, 64), None, None, training=True).view(4, 4, 4, 2, 2))
            )
        ],
        [Block(lambda x: F.dropout(attend(x, 0.0), 0.0))],
        [Block(to_tokens), nn.LSTM(4, 4, 2, batch_first=True)],
        [slowfast_small(8, dropout=0.5)],
        [i3d_nln_small(8, dropout=0.5)],
    ],
    ids=["converted", "per clip", "instance norm", "standardised weights", "attention", "rnn", "slowfast", "nonlocal"],
)
def test_other_networks_are_accepted_and_stay_unchanged(layers: list[nn.Module]) -> None:
    model = nn.Sequential(*layers).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    check(model)
    for name, value in model.state_dict().items():
        assert value.shape != before[name].shape or torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert not any(layer.training for layer in model.modules())


def test_the_message_names_all_layers_at_fault() -> None:
    with pytest.raises(UserError, match=r"^model: 0 \(Block\) draws .* in 2 \(Block\)$"):
        check(nn.Sequential(Block(lambda x: F.dropout(x)[:, :3]), nn.ReLU(), Block(lambda x: F.dropout(x))))
