"""An exponential moving average of a network's weights and BN statistics, evaluated in place of the network."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mgvideo.plan.plan import Plan, finite_or_nan, require


class ModelEma:
    """The moving average of a network over the steps of a plan.

    `decay` is that of a step with the base's batch. A phase whose batch is b times as large uses decay^b, so that the
    average covers equally many clips in all phases (the EMA scaling rule of Busbridge et al., arXiv 2307.13813). In the
    first steps the decay is at most (1 + step) / (10 + step), as in TensorFlow: the average leaves the initial weights
    behind even if a run is short.

    Args:
        model: the network, on its device, converted like for training.
        plan: the run's plan.
        decay: 0 to 1, without 1.

    Attributes:
        model: a copy of the network with the averages of its parameters and floating-point buffers. Other buffers have
            the network's current values.

    Raises:
        UserError: `decay` is out of range.
    """

    def __init__(self, model: nn.Module, plan: Plan, decay: float) -> None:
        require(0 <= finite_or_nan(decay) < 1, f"train.ema={decay}: give a number from 0 up, below 1, such as 0.9999")
        self.plan, self.decay = plan, decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
        self._averages, self._sources = _unzip([pair for pair in pairs if pair[0].is_floating_point()])
        self._copies, self._originals = _unzip([pair for pair in pairs if not pair[0].is_floating_point()])

    def decay_at(self, step: int) -> float:
        """Return the decay of a step."""
        return min(self.decay ** self.plan.phase(step).multiplier, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, skip: Tensor) -> None:
        """Update the average after a step, except if `skip`, a bool scalar on the device, is true."""
        weight = (1 - self.decay_at(step)) * (~skip)
        differences = torch._foreach_sub(self._sources, self._averages)
        torch._foreach_mul_(differences, weight)
        torch._foreach_add_(self._averages, differences)
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [average for average, _ in pairs], [source for _, source in pairs]
