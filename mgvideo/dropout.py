"""Dropout drawn per clip of the global batch, so that it does not depend on ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ClipDropout(nn.Dropout):
    """`nn.Dropout` whose mask is drawn for all clips of a step, and of which a forward takes the rows of its own.

    All ranks and micro-batches seed torch's generator alike before a forward, and so draw the same mask.
    """

    batch: int | None = None  # clips of the step over all ranks; None: as nn.Dropout
    clips: Tensor | None = None  # int64 `[n]`, which of them a forward gets; a tensor, so that compiled code serves all

    def forward(self, input: Tensor) -> Tensor:
        """Of `[n, …]`, n the length of `clips`."""
        if not self.training or self.batch is None or self.p == 0:
            return super().forward(input)
        drawn = torch.rand((self.batch, *input.shape[1:]), device=input.device)
        kept = drawn[self.clips] >= self.p
        return input * kept / (1 - self.p) if self.p < 1 else input * 0


def convert_clip_dropout(model: nn.Module) -> nn.Module:
    """Turns every `nn.Dropout` of a model into a `ClipDropout`, in place, and returns the model."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = ClipDropout
    return model


@contextmanager
def dropout_of(model: nn.Module, batch: int, start: int, stop: int) -> Iterator[None]:
    """Forwards inside it get the clips `[start, stop)` of a step's `batch`; outside, dropout is nn.Dropout's."""
    layers = [module for module in model.modules() if isinstance(module, ClipDropout) and module.p > 0]
    clips = torch.arange(start, stop, device=next(model.parameters()).device) if layers else None
    for layer in layers:
        layer.batch, layer.clips = batch, clips
    try:
        yield
    finally:
        for layer in layers:
            layer.batch = layer.clips = None
