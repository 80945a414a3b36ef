"""Optimizer steps that can be skipped on the device, and loading of an optimizer's saved state, for any optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves

from .lamb import Lamb


class SkippableStep:
    """Takes an optimizer's steps, except those that a tensor on the device marks to be skipped.

    A skipped step leaves parameters and state unchanged. torch's fused optimizers and `Lamb` skip by themselves. For
    any other optimizer, the parameters and state are copied before the step and restored after it. Both run on the
    device, and the host does not wait for `skip`.

    One case cannot be undone on the device: state that a step creates, or that is on the host, such as a step count
    that is a Python number. If training continues after a skipped step (`continues=True`, as with fp16), the host reads
    `skip` in such steps. Otherwise nothing uses that state afterwards.
    """

    def __init__(self, optimizer: Optimizer, continues: bool) -> None:
        self.optimizer, self.continues = optimizer, continues
        self._stepped: set[Tensor] = set()  # parameters whose state exists
        self._state_on_host = False

    def __call__(self, skip: Tensor) -> None:
        """Take a step, or skip it where `skip`, a bool scalar on the parameters' device, is true."""
        optimizer = self.optimizer
        if skips_by_itself(optimizer):
            _create_momentum(optimizer)
            optimizer.grad_scale, optimizer.found_inf = None, skip.float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif self.continues and (self._state_on_host or not self._stepped.issuperset(_with_gradients(optimizer))):
            if not skip:
                self._step_on_host(skip.device)
        else:
            _step_and_restore(optimizer, skip)

    def _step_on_host(self, device: torch.device) -> None:
        settings = _numbers(self.optimizer)
        self.optimizer.step()
        self._stepped.update(_with_gradients(self.optimizer))
        values = tree_leaves(list(self.optimizer.state.values()))
        on_device = all(isinstance(value, Tensor) and value.device == device for value in values)
        all_listed = len(values) == len(_state(self.optimizer))  # no tensors that `_state` does not return
        self._state_on_host = not (on_device and all_listed) or settings != _numbers(self.optimizer)


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether this is `Lamb` or a fused optimizer of torch, whose step does nothing if its `found_inf` is not 0.

    False for classes derived from one, whose step may do other things. False with dampening: SGD's first step then
    differs from a step with zero momentum, which `_create_momentum` assumes.
    """
    if type(optimizer) is Lamb:
        return True
    return type(optimizer).__module__.startswith("torch.optim.") and all(
        group.get("fused") and not group.get("dampening") for group in optimizer.param_groups
    )


def _create_momentum(optimizer: Optimizer) -> None:
    """Create SGD's missing momentum buffers as zeros, which makes no difference to the first step.

    torch allocates them uninitialised and fills them in the first step. If the kernel skips that step, they would stay
    uninitialised.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else []:
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


@torch.no_grad()
def _step_and_restore(optimizer: Optimizer, skip: Tensor) -> None:
    """Take a step, then restore parameters and state where `skip` is true."""
    before = {key: value.clone() for key, value in _tensors(optimizer, skip.device).items()}
    optimizer.step()
    after = _tensors(optimizer, skip.device)
    for key, old in before.items():
        if key in after:
            after[key].copy_(torch.where(skip, old, after[key]))


def _tensors(optimizer: Optimizer, device: torch.device) -> dict[Any, Tensor]:
    """Return the parameters and the tensors of their state that are on the device, by (parameter, name)."""
    parameters = {(p, ""): p for group in optimizer.param_groups for p in group["params"]}
    return parameters | {key: value for key, value in _state(optimizer).items() if value.device == device}


def _state(optimizer: Optimizer) -> dict[Any, Tensor]:
    """Return the tensors of an optimizer's state by (parameter, name)."""
    states = [(p, values) for p, values in optimizer.state.items() if isinstance(p, Tensor)]
    return {(p, name): v for p, values in states for name, v in values.items() if isinstance(v, Tensor)}


def _with_gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _numbers(optimizer: Optimizer) -> list[dict[str, float]]:
    """Return the Python numbers in an optimizer's groups: settings and, in some optimizers, step counts."""
    return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in optimizer.param_groups]


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict of an optimizer, but keep this optimizer's settings, such as weight decay.

    Gives each state tensor the memory layout of its parameter, because fused kernels read both in memory order. The run
    that saved the state may have used another layout.

    Raises:
        ValueError: the state belongs to an optimizer with other parameters.
    """
    settings = [{key: group[key] for key in group.keys() - {"params"}} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, group_settings in zip(optimizer.param_groups, settings, strict=True):
        group.update(group_settings)
    for (parameter, name), value in _state(optimizer).items():
        if value.shape == parameter.shape:
            optimizer.state[parameter][name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
