"""Dropout and drop path per clip: masks are the same on every rank and in every micro-batch, and random otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import StochasticDepth

from mgvideo.errors import UserError
from mgvideo.layers.dropout import ClipDropPath, convert_clip_dropout, dropout_for_clips

BATCH = 12  # clips of a global batch
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {  # a layer and the shape of a row of its input
    "dropout": (nn.Dropout(0.4), (7, 6)),
    "dropout1d": (nn.Dropout1d(0.4), (30, 5)),
    "dropout2d": (nn.Dropout2d(0.4), (30, 3, 2)),
    "dropout3d": (nn.Dropout3d(0.4), (30, 2, 3, 2)),
    "drop path": (StochasticDepth(0.4, "row"), (5, 4)),
    "own drop path": (ClipDropPath(0.4), (5, 4)),
}


def network(layer: nn.Module) -> nn.Module:
    return convert_clip_dropout(nn.Sequential(nn.Identity(), layer, nn.Linear(1, 1))).train()


def forward(model: nn.Module, clips: Tensor, start: int, seed: int = 0) -> Tensor:
    """Return the layer's output for the clips of a step from `start` on, as the training step runs it."""
    torch.manual_seed(seed)
    with dropout_for_clips(model, BATCH, start, start + len(clips)):
        return model[1](clips)


@pytest.mark.parametrize("name", LAYERS)
def test_the_mask_of_a_clip_does_not_depend_on_the_clips_beside_it(name: str) -> None:
    layer, shape = LAYERS[name]
    model, clips = network(layer), torch.rand(BATCH, *shape) + 1
    whole = forward(model, clips, 0)
    for bounds in ([0, 6, 12], [0, 1, 5, 12], list(range(13))):
        parts = [forward(model, clips[a:b], a) for a, b in pairwise(bounds)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(forward(model, clips, 0, seed=1), whole), "another step draws other masks"
    masks = (whole != 0).flatten(1)
    assert len({tuple(row.tolist()) for row in masks}) > (1 if "path" in name else BATCH - 2), "clips share masks"


@pytest.mark.parametrize("name", ["dropout", "dropout2d", "drop path"])
def test_frames_that_are_folded_into_the_batch_use_the_masks_of_their_clip(name: str) -> None:
    layer, shape = LAYERS[name]
    model, frames = network(layer), torch.rand(BATCH * 4, *shape) + 1
    with dropout_for_clips(model, BATCH, 0, BATCH):
        torch.manual_seed(0)
        whole = model[1](frames)
    with dropout_for_clips(model, BATCH, 5, 8):
        torch.manual_seed(0)
        assert torch.equal(model[1](frames[20:32]), whole[20:32])
        with pytest.raises(UserError, match=r"\[31, .* for 3 clips"):
            model[1](frames[:31])


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("dropout", lambda x: x),
        ("dropout1d", lambda x: x.mean(2)),
        ("dropout2d", lambda x: x.mean((2, 3))),
        ("dropout3d", lambda x: x.mean((2, 3, 4))),
        ("drop path", lambda x: x.flatten(1).mean(1)),
    ],
)
def test_whole_elements_channels_or_clips_are_dropped_and_the_rest_is_scaled(
    name: str, unit: Callable[[Tensor], Tensor]
) -> None:
    layer, shape = LAYERS[name]
    model, ones = network(layer), torch.ones(3000, *shape, requires_grad=True)
    torch.manual_seed(0)
    y = model[1](ones)
    y.sum().backward()
    assert torch.equal(ones.grad, y), "the gradient has the mask of the output"
    values = unit(y.detach())  # one value for each element, channel or clip that has its own random number
    assert sorted(values.unique().tolist()) == pytest.approx([0, 1 / 0.6])
    dropped = (values == 0).double().mean().item()
    assert abs(dropped - 0.4) < 5 * math.sqrt(0.4 * 0.6 / values.numel())
    assert torch.equal(model.eval()[1](ones), ones)


def correlations(rows: Tensor) -> tuple[float, float]:
    """Return the standard deviation and largest absolute value of the correlations between the rows of a mask."""
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    centred = (centred / centred.norm(dim=1, keepdim=True)).nan_to_num()
    pairs = (centred @ centred.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))]
    return pairs.std().item(), pairs.abs().max().item()


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
def test_masks_of_clips_are_as_uncorrelated_as_independent_draws(p: float) -> None:
    model, shape = network(nn.Dropout(p)), (256, 20_000)
    torch.manual_seed(0)
    kept = model[1](torch.ones(shape)) != 0
    independent = torch.rand(shape) >= p
    assert abs(kept.double().mean().item() - 1 + p) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    # between clips, then between elements
    for mask, reference in ((kept, independent), (kept.T[:256], independent.T[:256])):
        std, largest = correlations(mask)
        reference_std, reference_largest = correlations(reference)
        assert std == pytest.approx(reference_std, rel=0.05)
        assert largest < 1.5 * reference_largest


def test_layers_of_the_same_shape_draw_different_masks() -> None:
    model = convert_clip_dropout(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5), nn.Linear(1, 1)))
    clips = torch.ones(4, 100)
    with dropout_for_clips(model, 4, 0, 4):
        assert not torch.equal(model[0](clips), model[1](clips))


class CostCounter(TorchDispatchMode):
    """Counts the random numbers that are drawn, and the elements that all operations return."""

    numbers = elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.numbers += result.numel()
        self.elements += result.numel() if isinstance(result, Tensor) else 0
        return result


def test_the_cost_does_not_grow_with_the_global_batch() -> None:
    model, clips = network(nn.Dropout(0.1)), torch.rand(8, 50, 60)
    costs = {}
    for batch in (8, 4096):
        with dropout_for_clips(model, batch, batch - 8, batch), CostCounter() as counter:
            model[1](clips)
        costs[batch] = counter.numbers, counter.elements
    assert costs[8][0] <= 50 * 60 + 2 * 8
    assert costs[4096][0] <= 50 * 60 + 2 * 4096, "one number for each element of a clip, and two for each clip"
    assert costs[4096][1] <= costs[8][1] + 4 * 4096


def test_probabilities_of_zero_and_one() -> None:
    clips = torch.rand(3, 5)
    for layer, expected in ((nn.Dropout(0.0), clips), (nn.Dropout(1.0), clips * 0), (ClipDropPath(1.0), clips * 0)):
        assert torch.equal(network(layer)[1](clips), expected)
    with pytest.raises(UserError, match=r"p=1\.5"):
        ClipDropPath(1.5)


def test_compiled_code_draws_the_same_masks() -> None:
    model, clips = network(nn.Dropout(0.4)), torch.rand(BATCH, 7)
    expected = [forward(model, clips[a : a + 6], a) for a in (0, 6)]
    torch._dynamo.reset()
    compiled = torch.compile(model[1], backend="eager", dynamic=False, fullgraph=True)
    for start in (0, 6):
        torch.manual_seed(0)
        with dropout_for_clips(model, BATCH, start, start + 6):
            assert torch.equal(compiled(clips[start : start + 6]), expected[start // 6])


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (nn.AlphaDropout(0.1), "use nn.Dropout"),
        (nn.FeatureAlphaDropout(0.1), "use nn.Dropout"),
        (nn.RReLU(), "use nn.LeakyReLU"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "set its dropout to 0"),
        (nn.TransformerEncoderLayer(4, 2, 8), "set its dropout to 0"),
        (nn.LSTM(4, 4, 2, dropout=0.1), "set its dropout to 0"),
        (StochasticDepth(0.1, "batch"), 'use mode="row"'),
        (type("CustomDropout", (nn.Dropout,), {})(0.1), "use nn.Dropout"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_message_names_a_layer_that_cannot_be_converted(layer: nn.Module, advice: str) -> None:
    model = nn.ModuleDict({"stem": nn.Conv3d(3, 4, 1), "block": nn.Sequential(nn.ReLU(), layer)})
    with pytest.raises(UserError) as error:
        convert_clip_dropout(model)
    (line,) = str(error.value).splitlines()
    assert line.startswith("model: block.1")
    assert advice in line


def test_layers_that_draw_no_random_numbers_stay_unchanged() -> None:
    layers = [nn.MultiheadAttention(4, 2), nn.GRU(4, 4, 2), nn.AlphaDropout(0.0), nn.LeakyReLU()]
    model = convert_clip_dropout(nn.Sequential(*layers))
    assert [type(layer) for layer in model] == [type(layer) for layer in layers]


def test_strength_scales_drop_path_alone() -> None:
    clips = torch.ones(20_000, 1)
    for layer, expected in ((ClipDropPath(0.4), 0.2), (nn.Dropout(0.4), 0.4)):
        model = network(layer)
        torch.manual_seed(0)
        with dropout_for_clips(model, len(clips), 0, len(clips), strength=0.5):
            output = model[1](clips)
        assert (output == 0).float().mean().item() == pytest.approx(expected, abs=0.01)
        assert output.mean().item() == pytest.approx(1, abs=0.02)
        assert model[1].strength == 1  # outside of the block
