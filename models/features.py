"""Pooled features of a network: what its classifier, the last linear layer, gets as input."""

from __future__ import annotations

from torch import Tensor, nn

from mgvideo.errors import UserError


def find_classifier(model: nn.Module) -> nn.Linear:
    """Return the last linear layer of a network. Raises UserError if there is none."""
    linear_layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear_layers:
        raise UserError(f"{type(model).__name__} has no linear layer, so its pooled features are not defined")
    return linear_layers[-1]


class PooledFeatures(nn.Module):
    """A network that returns the input of its classifier instead of its logits.

    The logits are `features @ classifier.weight.T + classifier.bias`, in evaluation mode.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._classifier = [find_classifier(network)]  # in a list, so that it is not registered twice

    @property
    def channels(self) -> int:
        """The number of features."""
        return self._classifier[0].in_features

    def forward(self, clips: Tensor) -> Tensor:
        """Map clips `[n, 3, t, h, w]` to features `[n, channels]`."""
        inputs: list[Tensor] = []
        hook = self._classifier[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        try:
            self.network(clips)
        finally:
            hook.remove()
        features = inputs[-1]
        if features.ndim != 2:
            raise UserError(
                f"the last linear layer of {type(self.network).__name__} gets {list(features.shape)}, not one vector "
                "a clip: pool before it"
            )
        return features
