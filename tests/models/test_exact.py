"""The networks are the published ones: their logits, parameters and cost."""

from __future__ import annotations

import pytest
import torch
from golden import CASES, CONFIGS, clip, weights
from zoo import build

from mgvideo.models.pretrained import load_pretrained


def test_every_case_is_tested() -> None:
    assert CASES.keys() == CONFIGS.keys()


@pytest.mark.parametrize("name", CASES)
def test_published_weights_give_published_logits(name: str) -> None:
    model = build(CONFIGS[name], width=8).eval()
    load_pretrained(model, weights(CASES[name]), CASES[name]["source"])
    with torch.no_grad():
        logits = model(clip(CASES[name]))
    difference = (logits - torch.tensor(CASES[name]["logits"])).abs().max().item()
    print(f"{name}: largest difference {difference:.1e}")
    assert difference < 1e-3
