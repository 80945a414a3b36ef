"""Dropout and drop path drawn per clip of the global batch, so that they do not depend on ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mgvideo.errors import UserError

INT32 = (-(2**31), 2**31)


class ClipMask(nn.Module):
    """Base of the layers here: the mask of a clip depends on the step and the clip, not on the clips beside it.

    All ranks and micro-batches seed torch's generator alike before a forward pass. A layer draws one integer for each
    element of a clip, and a multiplier and an offset for each clip of the global batch. The number of an element in a
    clip is integer · multiplier + offset, modulo 2³²: uniform, and without correlation between elements or clips. So
    the cost of drawing does not grow with the global batch, and a rank computes the masks of its own clips only.
    """

    p: float
    batch: int | None = None  # clips of the step over all ranks; None: each row of the input is a clip
    clips: Tensor | None = (
        None  # int64 `[n]`: which of them the input holds; a tensor, so that compiled code serves all
    )

    def forward(self, input: Tensor) -> Tensor:
        """Drops from float `[rows, …]`, in training only, and scales what it keeps by 1 / (1 − p).

        A row is a clip. Where a network folds frames into the batch, the k rows of a clip follow each other.

        Raises:
            UserError: the number of rows is not a multiple of the number of clips.
        """
        if not self.training or self.p == 0:
            return input
        if self.p == 1:
            return input * 0
        return input * self._kept(input) / (1 - self.p)

    def _drawn(self, shape: Sequence[int]) -> Sequence[int]:
        """The shape of one row's mask for rows of `shape`; it broadcasts over the dimensions of size 1."""
        return shape

    def _kept(self, input: Tensor) -> Tensor:
        """Bool mask that broadcasts over `input`, true with probability 1 − p."""
        rows = len(input)
        batch = rows if self.batch is None else self.batch
        clips = rows if self.clips is None else len(self.clips)
        if rows % clips:
            raise UserError(
                f"dropout: an input {list(input.shape)} for {clips} clips: its first dimension must be the clips, "
                "or the clips times a number of rows each"
            )
        shape = (rows // clips, *self._drawn(input.shape[1:]))
        numbers = torch.randint(*INT32, shape, dtype=torch.int32, device=input.device)
        keys = torch.randint(*INT32, (2, batch, *[1] * len(shape)), dtype=torch.int32, device=input.device)
        multiplier, offset = keys if self.clips is None else keys[:, self.clips]
        mixed = torch.addcmul(offset, numbers, multiplier | 1)  # odd, so that no two numbers become one
        return (mixed >= int(self.p * 2**32) - 2**31).flatten(0, 1)


class ClipDropout(ClipMask, nn.Dropout):
    """`nn.Dropout` with a mask per clip."""


class ClipChannelDropout(ClipMask, nn.modules.dropout._DropoutNd):
    """`nn.Dropout1d`, `nn.Dropout2d` or `nn.Dropout3d` of `[rows, channels, …]` with a mask per clip."""

    def _drawn(self, shape: Sequence[int]) -> Sequence[int]:
        return (shape[0], *[1] * (len(shape) - 1))


class ClipDropPath(ClipMask):
    """Drop path, also called stochastic depth: drops a residual branch for each clip by itself.

    `x = x + drop_path(branch(x))`. As `torchvision.ops.StochasticDepth(p, mode="row")`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UserError(f"drop path: p={p}: give a probability from 0 to 1")
        self.p = p

    def _drawn(self, shape: Sequence[int]) -> Sequence[int]:
        return [1] * len(shape)

    def extra_repr(self) -> str:
        """Its probability, in the printed network."""
        return f"p={self.p}"


PER_CLIP: dict[type[nn.Module], type[ClipMask]] = {
    nn.Dropout: ClipDropout,
    nn.Dropout1d: ClipChannelDropout,
    nn.Dropout2d: ClipChannelDropout,
    nn.Dropout3d: ClipChannelDropout,
}


def convert_clip_dropout(model: nn.Module) -> nn.Module:
    """Turn a model's dropout and drop path layers into per-clip ones, in place, and return the model.

    Converts `nn.Dropout`, `nn.Dropout1d` to `nn.Dropout3d`, and torchvision's `StochasticDepth` in row mode.

    Raises:
        UserError: a layer of torch or torchvision that draws random numbers and has no per-clip version, or one whose
            probability is none. What else draws random numbers, `mgvideo.engine.forward_check` finds.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if kind in PER_CLIP:
            if not 0 <= module.p <= 1:  # torch itself lets NaN pass
                raise UserError(f"model: {name} ({kind.__name__}) has p={module.p}: give a probability from 0 to 1")
            module.__class__ = PER_CLIP[kind]
        elif _is_stochastic_depth(module) and module.mode == "row":
            module.__class__ = ClipDropPath
        elif instead := _instead(module):
            raise UserError(
                f"model: {name or 'the network itself'} ({kind.__name__}) draws random numbers that depend on ranks "
                f"and micro-batches: {instead}"
            )
    return model


def _is_stochastic_depth(module: nn.Module) -> bool:
    """Whether this is torchvision's drop path, told by name: importing torchvision takes a second."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("torchvision.ops.stochastic_depth", "StochasticDepth")


def _instead(module: nn.Module) -> str | None:
    """What to use instead of a layer that draws random numbers in a way of its own, None for any other layer."""
    if isinstance(module, ClipMask):
        return None
    if _is_stochastic_depth(module):
        return 'use mode="row"'
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return "set its dropout to 0 and apply nn.Dropout to its output"
    if isinstance(module, nn.RNNBase) and module.dropout > 0:
        return "set its dropout to 0 and put nn.Dropout between layers of one each"
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return "use nn.Dropout, nn.Dropout1d, nn.Dropout2d or nn.Dropout3d"
    if isinstance(module, nn.RReLU):
        return "use nn.LeakyReLU"
    return None


@contextmanager
def dropout_of(model: nn.Module, batch: int, start: int, stop: int) -> Iterator[None]:
    """Inside, forward passes are of clips `[start, stop)` of a step's `batch`; outside, each row counts as a clip."""
    layers = [module for module in model.modules() if isinstance(module, ClipMask) and module.p > 0]
    clips = torch.arange(start, stop, device=next(model.parameters()).device) if layers else None
    for layer in layers:
        layer.batch, layer.clips = batch, clips
    try:
        yield
    finally:
        for layer in layers:
            layer.batch = layer.clips = None
