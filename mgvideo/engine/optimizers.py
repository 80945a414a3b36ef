"""The optimizers of the config group `optimizer`: SGD, AdamW and LAMB, with groups of parameters for each."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW

from mgvideo.errors import UserError
from mgvideo.plan.plan import finite_or_nan, require

from .lamb import Lamb


def sgd(
    model: nn.Module,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 1e-4,
    decay_norm_and_bias: bool = True,
    layer_decay: float | None = None,
) -> SGD:
    """Build SGD with momentum, the optimizer of the paper's recipes.

    The fused kernel reads memory once and can skip a step by itself: see `SkippableStep`.

    Args: see `parameter_groups`.

    Raises:
        UserError: a value is invalid, or the network has no depths for `layer_decay`.
    """
    groups = parameter_groups(model, weight_decay, decay_norm_and_bias, layer_decay)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)


def adamw(
    model: nn.Module,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    decay_norm_and_bias: bool = False,
    layer_decay: float | None = None,
) -> AdamW:
    """Build AdamW (Loshchilov and Hutter, arXiv 1711.05101) with torch's fused kernel, which can skip a step by itself.

    Args: see `parameter_groups`.

    Raises:
        UserError: a value is invalid, or the network has no depths for `layer_decay`.
    """
    groups = parameter_groups(model, weight_decay, decay_norm_and_bias, layer_decay)
    return AdamW(groups, lr=lr, betas=_check_betas(betas), eps=_check_eps(eps), fused=True)


def lamb(
    model: nn.Module,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    decay_norm_and_bias: bool = False,
    layer_decay: float | None = None,
) -> Lamb:
    """Build LAMB. Parameters without weight decay take plain steps of AdamW, as in the paper's code.

    Args: see `parameter_groups`.

    Raises:
        UserError: a value is invalid, or the network has no depths for `layer_decay`.
    """
    groups = parameter_groups(model, weight_decay, decay_norm_and_bias, layer_decay)
    for group in groups:
        group["adapts"] = group["decays"]
    return Lamb(groups, lr, _check_betas(betas), _check_eps(eps))


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_norm_and_bias: bool, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return the groups of a network's trainable parameters for an optimizer.

    Each group has `params`, `weight_decay`, `decays` (whether it takes weight decay) and `lr_scale`, by which
    `TrainStep` multiplies the plan's LR.

    Args:
        model: the network.
        weight_decay: of the parameters that take it.
        decay_norm_and_bias: False: no weight decay on parameters of one dimension (norms and biases), nor on those that
            the network names in its attribute `no_weight_decay`, such as position tables.
        layer_decay: LR of a layer, divided by that of the next deeper one. Needs a network with a method
            `parameter_depths()`, which returns the depth of each parameter by name. None: the same LR everywhere.

    Raises:
        UserError: a value is invalid, the network has no depths, or it has no trainable parameters.
    """
    require(finite_or_nan(weight_decay) >= 0, f"optimizer.weight_decay={weight_decay}: give 0 or more")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    require(bool(parameters), "train.freeze leaves no parameters to train: freeze fewer parts of the network")
    scales = _lr_scales(model, list(parameters), layer_decay)
    not_decayed = set() if decay_norm_and_bias else _without_weight_decay(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = decay_norm_and_bias or (parameter.dim() > 1 and name not in not_decayed)
        groups.setdefault((scales[name], decays), []).append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if decays else 0.0, "decays": decays, "lr_scale": scale}
        for (scale, decays), group in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def _without_weight_decay(model: nn.Module) -> set[str]:
    """Return the parameters that match a pattern in the attribute `no_weight_decay` of the network or a part of it.

    Patterns are relative to the part, as in `pos_embed` or `blocks.*.rel_pos_t`. In networks of timm it is a method.
    """
    names = set()
    for prefix, module in model.named_modules():
        patterns = getattr(module, "no_weight_decay", ())
        for pattern in patterns() if callable(patterns) else patterns:
            full = f"{prefix}.{pattern}" if prefix else pattern
            names |= {name for name, _ in model.named_parameters() if fnmatchcase(name, full)}
    return names


def _lr_scales(model: nn.Module, names: Sequence[str], layer_decay: float | None) -> dict[str, float]:
    """Return the LR factor of each parameter: 1 at the head, multiplied by `layer_decay` for each layer before it.

    As in BEiT (Bao et al., arXiv 2106.08254) and the fine-tuning of VideoMAE (Tong et al., arXiv 2203.12602).
    """
    if layer_decay is None:
        return dict.fromkeys(names, 1.0)
    setting = f"optimizer.layer_decay={layer_decay}"
    require(0 < finite_or_nan(layer_decay) <= 1, f"{setting}: give a number above 0 and up to 1")
    get_depths = getattr(model, "parameter_depths", None)
    if get_depths is None:
        raise UserError(f"{setting}: {type(model).__name__} does not define the depths of its layers: set it to null")
    depths = get_depths()
    missing = [name for name in names if name not in depths]
    require(not missing, f"{setting}: {type(model).__name__}.parameter_depths() lacks {', '.join(missing[:3])}")
    deepest = max(depths.values())
    return {name: layer_decay ** (deepest - depths[name]) for name in names}


def _check_betas(betas: Sequence[float]) -> tuple[float, float]:
    values = list(betas) if isinstance(betas, Sequence) and not isinstance(betas, str) else [betas]
    valid = len(values) == 2 and all(0 <= finite_or_nan(beta) < 1 for beta in values)
    require(valid, f"optimizer.betas={betas}: give two numbers from 0 up, below 1")
    return values[0], values[1]


def _check_eps(eps: float) -> float:
    require(finite_or_nan(eps) > 0, f"optimizer.eps={eps}: give a number above 0")
    return eps
