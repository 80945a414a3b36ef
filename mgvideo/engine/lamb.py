"""LAMB, an Adam whose step length follows the norm of each weight, for large batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class Lamb(Optimizer):
    """LAMB (You et al., ICLR 2020, arXiv 1904.00962, algorithm 2, with φ(z) = z), of foreach operations.

    Like torch's fused optimizers, `step` changes nothing if the attribute `found_inf`, a scalar on the device, is not
    0. The host does not wait for it.

    Args:
        parameters: parameters or groups of them. A group with `adapts=False` takes plain steps of AdamW: the paper's
            code does so for norms and biases.
        lr: learning rate.
        betas: decay of the running means of the gradient and of its square.
        eps: added to the root of the mean square.
        weight_decay: decoupled from the gradient, as in AdamW; part of the step whose length is adapted.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step with the gradients in `grad`. A skipped step sets them to 0."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_group(group, parameters)

    def _step_group(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        first = parameters[0]
        skip = torch.zeros((), dtype=torch.bool, device=first.device) if self.found_inf is None else self.found_inf != 0
        keep = (~skip).to(first.dtype)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.found_inf is not None:
            _multiply_bits(gradients, ~skip)
        updates = self._adam_updates(group, parameters, gradients, skip, keep)
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        if not group.get("adapts", True):
            torch._foreach_mul_(updates, group["lr"] * keep)
            torch._foreach_sub_(parameters, updates)
            return
        norms, update_norms = (torch.stack(torch._foreach_norm(tensors)) for tensors in (parameters, updates))
        ratios = torch.where((norms > 0) & (update_norms > 0), norms / update_norms, 1.0)
        for parameter, update, rate in zip(parameters, updates, (group["lr"] * keep * ratios).unbind(), strict=True):
            parameter.addcmul_(update, rate, value=-1)  # foreach operations take no list of factors on the device

    def _adam_updates(
        self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], skip: Tensor, keep: Tensor
    ) -> list[Tensor]:
        """Update the running means, and return Adam's update of each parameter, without weight decay and LR.

        With `skip`, gradients are 0 and the means stay as they are.
        """
        states = [self._state_of(parameter) for parameter in parameters]
        means, squares, counts = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "num_steps"))
        beta1, beta2 = group["betas"]
        torch._foreach_add_(counts, [keep] * len(counts))
        count = torch.stack(counts).max().clamp(min=1)
        torch._foreach_mul_(means, torch.where(skip, torch.ones_like(keep), beta1))
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, torch.where(skip, torch.ones_like(keep), beta2))
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, (1 - beta2**count).sqrt())
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(means, denominators)
        torch._foreach_div_(updates, 1 - beta1**count)
        return list(updates)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return a parameter's state, which is created if needed: running means and the number of steps taken."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["num_steps"] = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def _multiply_bits(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply the bits of floats by a bool scalar, in place. Unlike a product of floats, this turns NaN into 0 too."""
    integers = [tensor.view(INTEGERS[tensor.element_size()]) for tensor in tensors]
    torch._foreach_mul_(integers, factor.to(integers[0].dtype))
