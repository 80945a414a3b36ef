"""Builds the networks of configs/model as the command line does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf
from torch import nn

import mgvideo.configs

FOLDER = Path(mgvideo.configs.__path__[0]) / "model"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def build(name: str, num_classes: int = 10, **overrides: object) -> nn.Module:
    """Build the network of a config file, with some of its keys overridden."""
    file: Any = OmegaConf.load(FOLDER / f"{name}.yaml")
    model = OmegaConf.merge(file.get("model", file), overrides)  # a file may have the package _global_
    run = OmegaConf.create({"model": model, "dataset": {"num_classes": num_classes}})
    return hydra.utils.instantiate(run.model)


def build_narrow(name: str, num_classes: int = 10, **overrides: object) -> nn.Module:
    """Build the network of a config file with few channels, for tests that need no published width."""
    widths = {"swin3d": {"width": 8, "head_width": 4}, "mvit": {"width": 8}, "vit": {"width": 96}}
    narrow = next((keys for family, keys in widths.items() if name.startswith(family)), {"width": 8})
    return build(name, num_classes, **{**narrow, **overrides})
