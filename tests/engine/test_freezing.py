"""Which parameters and modules `train.freeze` freezes, in our networks and in custom ones."""

from typing import Any

import pytest
from torch import nn

from mgvideo.engine.freezing import freeze, frozen_modules, set_training_mode
from mgvideo.errors import UserError
from mgvideo.models.features import find_classifier
from mgvideo.models.small import slowfast_small


def custom() -> nn.Sequential:
    blocks = nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Dropout(0.5))
    return nn.Sequential(nn.Conv3d(3, 3, 1), blocks, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 2))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model", [custom(), slowfast_small(8)], ids=["custom", "slowfast"])
def test_a_frozen_backbone_leaves_the_classifier(model: nn.Module) -> None:
    freeze(model, "backbone", find_classifier)
    classifier = next(name for name, module in model.named_modules() if module is find_classifier(model))
    assert trainable(model) == {f"{classifier}.weight", f"{classifier}.bias"}
    set_training_mode(model, frozen_modules(model))
    assert find_classifier(model).training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_parts_are_frozen_by_name() -> None:
    model = custom()
    freeze(model, ["0", "1.0"], find_classifier)
    assert trainable(model) == {"1.1.weight", "1.1.bias", "4.weight", "4.bias"}
    assert frozen_modules(model) == ["0", "1.0"]
    freeze(model, "1", find_classifier)
    assert frozen_modules(model) == ["0", "1"]
    set_training_mode(model, ["0", "1"])
    assert [module.training for module in model] == [False, False, True, True, True]
    assert not model[1][2].training, "dropout in a frozen part does nothing"


@pytest.mark.parametrize("parts", ["res9", ["1", "1.00"], ["1.0", ""]])
def test_an_unknown_part_is_named(parts: Any) -> None:
    with pytest.raises(UserError, match=r"train\.freeze=\S*: Sequential has no part of this name: .* such as 0, 1, 2"):
        freeze(custom(), parts, find_classifier)


@pytest.mark.parametrize("parts", [3, {"a": 1}, [1]], ids=str)
def test_other_values_are_refused(parts: Any) -> None:
    with pytest.raises(UserError, match=r"train\.freeze=.*: give backbone, or a list"):
        freeze(custom(), parts, find_classifier)


def test_nothing_is_frozen_by_default() -> None:
    model = custom()
    freeze(model, None, find_classifier)
    assert len(trainable(model)) == len(list(model.parameters()))
    assert frozen_modules(model) == []
