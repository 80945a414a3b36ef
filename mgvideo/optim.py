"""The optimizer of the paper's recipes."""

from __future__ import annotations

from torch import nn
from torch.optim import SGD

from .errors import UserError


def sgd(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 1e-4,
    decay_norm_and_bias: bool = True,
) -> SGD:
    """SGD with momentum; with `decay_norm_and_bias` off, parameters of one dimension are not decayed.

    The fused kernel also skips a step on the device when told so, which is how a non-finite step is kept out.
    """
    if weight_decay < 0:  # which SGD looks at for all parameters alike only
        raise UserError(f"optimizer.weight_decay={weight_decay}: give 0 or more")
    decayed = [p for p in model.parameters() if p.requires_grad and (decay_norm_and_bias or p.dim() > 1)]
    plain = [p for p in model.parameters() if p.requires_grad and not (decay_norm_and_bias or p.dim() > 1)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return SGD([g for g in groups if g["params"]], lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
