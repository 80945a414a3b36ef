"""What networks of blocks share: activation checkpointing (Chen et al., arXiv 1604.06174), and depths of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def set_recompute(blocks: Iterable[nn.Module], recompute: bool) -> None:
    """Mark blocks that `run_block` runs again in backward. `clips_that_fit` of the core reads the mark."""
    for block in blocks:
        block.recompute = recompute  # type: ignore[assignment]


def run_block(block: nn.Module, *inputs: Any) -> Any:
    """Run a block. If it is marked, save only its inputs for backward, which then runs the block a second time.

    The second run draws the same random numbers. Batch norm does not count its statistics again: the core's layer
    recognises a forward pass inside of a backward pass.
    """
    if getattr(block, "recompute", False) and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def depths_of_parameters(
    model: nn.Module, stem: Iterable[nn.Module], blocks: Sequence[Iterable[nn.Module]]
) -> dict[str, int]:
    """Return the depth of each parameter of a model by its name, for layer-wise learning rates.

    The depth is 0 in `stem`, 1 in the modules of the first entry of `blocks`, and so on. All other parameters, those of
    the head, are one deeper than the last block.
    """
    depths: dict[nn.Parameter, int] = {}
    for depth, modules in enumerate([stem, *blocks]):
        depths |= {parameter: depth for module in modules for parameter in module.parameters()}
    return {name: depths.get(parameter, len(blocks) + 1) for name, parameter in model.named_parameters()}
