"""The published networks: tensor names, weights and clips by a rule, and the logits.

Those of models.json have an eighth of the full width, those of modern.json all of it.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zoo import build

DATA = Path(__file__).parents[1] / "data"
CASES = {
    case["name"]: case for file in ("models", "modern") for case in json.loads((DATA / f"{file}.json").read_text())
}
CONFIGS = {
    "slowfast_8x8_r50_w8": "slowfast_8x8_r50",
    "slowfast_4x16_r50_w8": "slowfast_4x16_r50",
    "i3d_8x8_r50_w8": "i3d_r50",
    "i3d_nln_8x8_r50_w8": "i3d_nln_r50",
    "slow_8x8_r50_w8": "slow_r50",
    "ptv_r2plus1d_16x4_r50_w8": "r2plus1d_r50",
    "ptv_slow_8x8_r50_w8": "slow_r50",
    "ptv_slowfast_8x8_r50_w8": "slowfast_8x8_r50",
    "x3d_m_64": "x3d_m",
    "mvitv2_s_16x4_112": "mvit_v2_s",
    "videomae_s_16x64": "vit_s",
}


def build_case(name: str) -> nn.Module:
    """Build the network of a case, with random weights."""
    if name.endswith("_w8"):
        return build(CONFIGS[name], width=8)
    return build(CONFIGS[name], **({"table_size": 112} if name.startswith("mvit") else {}))


def _random(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def draw_weights(case: dict[str, Any]) -> dict[str, Tensor]:
    """Draw the state dict of a published network, with its published names."""
    state = {}
    for name, shape, kind, scale in case["tensors"]:
        if kind == "normal":
            state[name] = torch.from_numpy(np.asarray(_random(name).standard_normal(shape) * scale)).float()
        elif kind == "uniform":
            state[name] = torch.from_numpy((0.75 + 0.5 * _random(name).random_sample(shape)) * scale).float()
        else:
            state[name] = torch.zeros(shape, dtype=torch.int64)
    return state


def draw_clip(case: dict[str, Any]) -> Tensor:
    """Draw the clip that the published logits belong to."""
    return torch.from_numpy(_random("clip").standard_normal(case["input_shape"])).float()
