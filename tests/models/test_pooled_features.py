"""Pooled features are what the classifier of each family gets as input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import build_narrow

from mgvideo.errors import UserError
from mgvideo.models.features import PooledFeatures, find_classifier

pytestmark = pytest.mark.numeric


NEW = ["x3d_small", "mvit_small", "swin3d_t", "vit_small"]


@pytest.mark.parametrize("name", ["slow_r50", "i3d_nln_small", "slowfast_small", "r2plus1d_18", "r2plus1d_r50", *NEW])
def test_features_times_classifier_are_the_logits(name: str) -> None:
    torch.manual_seed(0)
    model = build_narrow(name).eval()
    classifier = find_classifier(model)
    nn.init.uniform_(classifier.bias)
    features = PooledFeatures(model)
    clips = torch.randn(2, 3, 9, 40, 50)
    with torch.no_grad():
        pooled = features(clips)
        assert pooled.shape == (2, features.channels)
        torch.testing.assert_close(classifier(pooled), model(clips))
    assert not classifier._forward_pre_hooks


def test_networks_without_pooled_features_are_refused() -> None:
    with pytest.raises(UserError, match="no linear layer"):
        PooledFeatures(nn.Conv3d(3, 4, 1))
    with pytest.raises(UserError, match="pool before it"):
        PooledFeatures(nn.Sequential(nn.Linear(8, 4)))(torch.randn(1, 3, 4, 8, 8))
