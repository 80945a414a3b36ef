"""Class activation maps add up to the logits and have the right shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import build, build_narrow

from mgvideo.errors import UserError
from mgvideo.models.cam import class_maps, sum_pathway_maps

pytestmark = pytest.mark.numeric

FAMILIES = ["slow_r50", "i3d_nln_small", "slowfast_8x8_r50", "slowfast_small", "r2plus1d_18", "r2plus1d_r50"]


def build_active(name: str) -> nn.Module:
    """Build a narrow network whose residual branches do not return zero."""
    torch.manual_seed(0)
    model = build(name, width=8).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.2, 0.6)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_means_of_maps_add_up_to_logit_without_bias(name: str) -> None:
    model = build_active(name)
    clips = torch.randn(2, 3, 9, 70, 50)
    with torch.no_grad():
        nn.init.uniform_(model.fc.bias if hasattr(model, "fc") else model.head.fc.bias)
        logits, maps = model(clips), class_maps(model, clips, 3)
    bias = (model.fc if hasattr(model, "fc") else model.head.fc).bias[3]
    assert len(maps) == (2 if name.startswith("slowfast") else 1)
    total = sum(pathway.mean((1, 2, 3)) for pathway in maps)
    torch.testing.assert_close(total + bias, logits[:, 3])
    assert not model.head._forward_pre_hooks if hasattr(model, "head") else not model.avgpool._forward_pre_hooks


@pytest.mark.parametrize("name", ["vit_s", "swin3d_t"])
def test_maps_of_transformers_add_up_to_logit_without_bias(name: str) -> None:
    torch.manual_seed(0)
    model, clips = build_narrow(name).eval(), torch.randn(2, 3, 8, 64, 48)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    with torch.no_grad():
        logits, (maps,) = model(clips), class_maps(model, clips, 3)
        bias = model.head.bias[3] + (model.head.weight[3] @ model.fc_norm.bias if name == "vit_s" else 0)
    assert maps.shape == ((2, 4, 4, 3) if name == "vit_s" else (2, 4, 2, 2))
    torch.testing.assert_close(maps.mean((1, 2, 3)) + bias, logits[:, 3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "reason"), [("mvit_small", "class token alone"), ("x3d_small", "one nn.Linear")])
def test_networks_without_maps_say_why(name: str, reason: str) -> None:
    with torch.no_grad(), pytest.raises(UserError, match=f"has no class-activation maps: .*{reason}"):
        class_maps(build_narrow(name).eval(), torch.randn(1, 3, 8, 32, 32), 0)


class Custom(nn.Module):
    """A network with names of its own: `average` is a layer or a function, `features` may be of any network."""

    def __init__(self, average: Callable[[Tensor], Tensor], classifier: nn.Module | None = None) -> None:
        super().__init__()
        self.average = average
        self.blocks = nn.Sequential(
            nn.Conv3d(3, 6, 3, stride=2), nn.BatchNorm3d(6), nn.ReLU(inplace=True), nn.Conv3d(6, 6, 1), nn.SiLU()
        )
        self.classifier = classifier or nn.Linear(6, 5)

    def forward(self, clips: Tensor) -> Tensor:
        return self.classifier(self.average(self.blocks(clips)))


AVERAGES = {
    "function": lambda features: features.mean((2, 3, 4)),
    "layer": nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.5)),
    "two layers": nn.Sequential(nn.AdaptiveAvgPool3d((1, None, None)), nn.AdaptiveAvgPool3d(1), nn.Flatten()),
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_custom_network_with_a_global_average_needs_no_particular_names(average: str, autocast: bool) -> None:
    torch.manual_seed(0)
    model, clips = Custom(AVERAGES[average]).eval(), torch.randn(2, 3, 9, 20, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, (maps,) = model(clips), class_maps(model, clips, 3)
    assert maps.shape == (2, 4, 9, 7)
    tolerance = 0.03 if autocast else 1e-5
    torch.testing.assert_close(
        maps.mean((1, 2, 3)) + model.classifier.bias[3], logits[:, 3].float(), atol=tolerance, rtol=tolerance
    )
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "model",
    [
        Custom(lambda features: features.amax((2, 3, 4))),
        Custom(lambda features: features.mean((2, 3, 4)), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))),
        Custom(lambda features: features.mean((3, 4)).flatten(1), nn.LazyLinear(5)),
        Custom(nn.AdaptiveAvgPool3d(1), nn.Sequential(nn.Conv3d(6, 5, 1), nn.Flatten())),
    ],
    ids=["maximum", "two linear layers", "no average over time", "no linear layer"],
)
def test_another_network_is_refused_in_one_line(model: nn.Module) -> None:
    with torch.no_grad(), pytest.raises(UserError, match=r"Custom has no class-activation maps: they need .* averaged"):
        class_maps(model.eval(), torch.randn(2, 3, 9, 20, 16), 3)


def test_autocast_does_not_round_maps() -> None:
    model, clips = build_active("slowfast_small"), torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        maps = class_maps(model, clips, 0)
    assert {pathway.dtype for pathway in maps} == {torch.float32}


def test_maps_of_pathways_are_summed_over_the_longer_time() -> None:
    slow, fast = torch.full((1, 2, 3, 4), 1.0), torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 3, 4)
    total = sum_pathway_maps([slow, fast])
    assert total.shape == fast.shape
    torch.testing.assert_close(total, fast + 1)
