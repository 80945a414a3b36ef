"""Parts of a network that keep their weights: linear probing, or fine-tuning of the last stages only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mgvideo.errors import UserError
from mgvideo.plan.formatting import shorten
from mgvideo.plan.plan import require

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def freeze(model: nn.Module, parts: Any, find_classifier: Callable[[nn.Module], nn.Module]) -> None:
    """Freeze parameters of a network, in place. Call it before the optimizer and DDP take the network's parameters.

    Args:
        model: the network.
        parts: `backbone`, for all parameters but those of the classifier; or one or several names of parts of the
            network, such as `["stem", "res2"]`, which stand for all parameters below them. None freezes nothing.
        find_classifier: returns the layer that computes a network's logits.

    Raises:
        UserError: the network has no part of a name, or no classifier.
    """
    if parts is None:
        return
    names = [parts] if isinstance(parts, str) else parts
    valid = isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
    require(valid, f"train.freeze={parts}: give backbone, or a list of parts of the network")
    for name in names:
        prefix = f"{name.rstrip('.')}."
        frozen = [p for other, p in model.named_parameters() if f"{other}.".startswith(prefix)]
        if name == "backbone" and not frozen:
            classifier = set(find_classifier(model).parameters())
            frozen = [p for p in model.parameters() if p not in classifier]
        if not frozen:
            parts_of_model = shorten([child for child, _ in model.named_children()], 20)
            raise UserError(
                f"train.freeze={name}: {type(model).__name__} has no part of this name: give backbone, or parts such "
                f"as {parts_of_model}"
            )
        for parameter in frozen:
            parameter.requires_grad_(False)


def frozen_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules whose parameters are all frozen, without those inside of such a module."""
    names: list[str] = []
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        is_inside = any(name.startswith(f"{outer}.") for outer in names)
        if parameters and not is_inside and not any(p.requires_grad for p in parameters):
            names.append(name)
    return names


def frozen_in_finish(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a finish of the head does not train.

    It trains those of the last linear layer, which is the head, and of the normalisation layers.
    """
    linear_layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    norms = [module for module in model.modules() if isinstance(module, NORMS)]
    trained = {id(parameter) for module in (*norms, *linear_layers[-1:]) for parameter in module.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in trained]


def set_training_mode(model: nn.Module, frozen: Sequence[str]) -> None:
    """Set a network to training mode, but its `frozen_modules` to evaluation mode.

    So batch norm there uses its running statistics and leaves them unchanged, and dropout there does nothing.
    """
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()
