"""Dropout and drop path with a mask per clip, the same on any number of ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mgvideo.errors import UserError

INT32_RANGE = (-(2**31), 2**31)


class ClipMask(nn.Module):
    """Base of the layers in this file: a clip's mask depends on the step and the clip, not on the clips beside it.

    All ranks and micro-batches seed torch's generator with the same value before a forward pass. A layer draws one
    integer for each element of a clip, and a multiplier and an offset for each clip of the global batch. The random
    number of an element is integer · multiplier + offset, modulo 2³²: uniform, and without correlation between elements
    or clips. So a rank computes the masks of its own clips only, and draws two numbers for each other clip.
    """

    p: float
    # Number of clips in the global batch; None: each row of the input is a clip.
    batch: int | None = None
    # int64 `[n]`: which of them the input holds. A tensor, so that torch.compile does not recompile for each range.
    clips: Tensor | None = None
    strength: float = 1.0  # of the slot, see `dropout_for_clips`

    @property
    def drop_probability(self) -> float:
        """The probability with which elements are dropped."""
        return self.p

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of float `[rows, …]`, in training only, and scale the rest by 1 / (1 − p).

        A row is a clip. If a network folds frames into the batch, the k rows of a clip must be consecutive.

        Raises:
            UserError: the number of rows is not a multiple of the number of clips.
        """
        p = self.drop_probability
        if not self.training or p == 0:
            return input
        if p == 1:
            return input * 0
        return input * self._keep_mask(input, p) / (1 - p)

    def _mask_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape of the mask for one clip with features of `shape`; dimensions of size 1 share one draw."""
        return shape

    def _keep_mask(self, input: Tensor, p: float) -> Tensor:
        """Return a bool mask that broadcasts over `input`, true with probability 1 − p."""
        rows = len(input)
        batch = rows if self.batch is None else self.batch
        clips = rows if self.clips is None else len(self.clips)
        if rows % clips:
            raise UserError(
                f"dropout: an input {list(input.shape)} for {clips} clips: its first dimension must be the clips, "
                "or the clips times a number of rows each"
            )
        shape = (rows // clips, *self._mask_shape(input.shape[1:]))
        integers = torch.randint(*INT32_RANGE, shape, dtype=torch.int32, device=input.device)
        keys = torch.randint(*INT32_RANGE, (2, batch, *[1] * len(shape)), dtype=torch.int32, device=input.device)
        multiplier, offset = keys if self.clips is None else keys[:, self.clips]
        # An odd multiplier maps different integers to different numbers.
        numbers = torch.addcmul(offset, integers, multiplier | 1)
        return (numbers >= int(p * 2**32) - 2**31).flatten(0, 1)


class ClipDropout(ClipMask, nn.Dropout):
    """`nn.Dropout` with a mask per clip."""


class ClipChannelDropout(ClipMask, nn.modules.dropout._DropoutNd):
    """`nn.Dropout1d`, `nn.Dropout2d` or `nn.Dropout3d` of `[rows, channels, …]` with a mask per clip."""

    def _mask_shape(self, shape: Sequence[int]) -> Sequence[int]:
        return (shape[0], *[1] * (len(shape) - 1))


class ClipDropPath(ClipMask):
    """Drop path, also called stochastic depth: drops a residual branch independently for each clip.

    Its probability is `p` times the strength of the step's slot.

    Use it as `x = x + drop_path(branch(x))`, like `torchvision.ops.StochasticDepth(p, mode="row")`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise UserError(f"drop path: p={p}: give a probability from 0 to 1")
        self.p = p

    @property
    def drop_probability(self) -> float:
        """The probability with which the branch of a clip is dropped."""
        return self.p * self.strength

    def _mask_shape(self, shape: Sequence[int]) -> Sequence[int]:
        return [1] * len(shape)

    def extra_repr(self) -> str:
        """Return the probability for the printed network."""
        return f"p={self.p}"


PER_CLIP_LAYERS: dict[type[nn.Module], type[ClipMask]] = {
    nn.Dropout: ClipDropout,
    nn.Dropout1d: ClipChannelDropout,
    nn.Dropout2d: ClipChannelDropout,
    nn.Dropout3d: ClipChannelDropout,
}


def convert_clip_dropout(model: nn.Module) -> nn.Module:
    """Turn a model's dropout and drop path layers into per-clip ones, in place, and return the model.

    Converts `nn.Dropout`, `nn.Dropout1d` to `nn.Dropout3d`, and torchvision's `StochasticDepth` in row mode.
    `mgvideo.engine.forward_check` finds other code that draws random numbers.

    Raises:
        UserError: a layer of torch or torchvision draws random numbers and has no per-clip version, or its probability
            is not in 0–1.
    """
    for name, module in model.named_modules():
        kind = type(module)
        if kind in PER_CLIP_LAYERS:
            if not 0 <= module.p <= 1:  # torch accepts NaN
                raise UserError(f"model: {name} ({kind.__name__}) has p={module.p}: give a probability from 0 to 1")
            module.__class__ = PER_CLIP_LAYERS[kind]
        elif _is_stochastic_depth(module) and module.mode == "row":
            module.__class__ = ClipDropPath
        elif advice := _replacement_advice(module):
            raise UserError(
                f"model: {name or 'the network itself'} ({kind.__name__}) draws random numbers that depend on ranks "
                f"and micro-batches: {advice}"
            )
    return model


def _is_stochastic_depth(module: nn.Module) -> bool:
    """Whether a module is torchvision's drop path. Compares names, because importing torchvision takes a second."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("torchvision.ops.stochastic_depth", "StochasticDepth")


def _replacement_advice(module: nn.Module) -> str | None:
    """For a layer whose random numbers cannot be drawn per clip, return what to use instead; None for other layers."""
    if isinstance(module, ClipMask):
        return None
    if _is_stochastic_depth(module):
        return 'use mode="row"'
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return "set its dropout to 0 and apply nn.Dropout to its output"
    if isinstance(module, nn.RNNBase) and module.dropout > 0:
        return "set its dropout to 0 and put nn.Dropout between single-layer RNNs"
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return "use nn.Dropout, nn.Dropout1d, nn.Dropout2d or nn.Dropout3d"
    if isinstance(module, nn.RReLU):
        return "use nn.LeakyReLU"
    return None


@contextmanager
def dropout_for_clips(model: nn.Module, batch: int, start: int, stop: int, strength: float = 1.0) -> Iterator[None]:
    """Set which clips all forward passes inside the block run: `[start, stop)` of a global batch of `batch` clips.

    `strength` multiplies the probability of drop path. Outside of the block, each row of an input counts as a clip.
    """
    layers = [module for module in model.modules() if isinstance(module, ClipMask) and module.p > 0]
    clips = torch.arange(start, stop, device=next(model.parameters()).device) if layers else None
    for layer in layers:
        layer.batch, layer.clips, layer.strength = batch, clips, strength
    try:
        yield
    finally:
        for layer in layers:
            layer.batch, layer.clips, layer.strength = None, None, 1.0
