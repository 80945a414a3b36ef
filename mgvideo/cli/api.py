"""The programs as functions, for notebooks and scripts: docs/python.md shows each of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mgvideo.errors import UserError

from . import app
from .groups import check_groups
from .schema import RunKeys, check_values


def compose(*overrides: str) -> DictConfig:
    """Return the checked config of a run, as `mgvideo run` composes it from the same words.

    Raises:
        UserError: A key, an option or a value does not exist. The message suggests the one that was meant.
    """
    cfg = app.compose_config("run", overrides)
    holder = HydraConfig.instance()
    running, holder.cfg = holder.cfg, None
    try:
        holder.set_config(cfg)  # the defaults of these keys refer to the chosen options
        chosen = {key: cfg[key] for key in ("output_dir", "model_option")}
    finally:
        holder.cfg = running
    run_cfg: Any = OmegaConf.masked_copy(cfg, [field.name for field in fields(RunKeys)])
    run_cfg.merge_with(chosen)
    check_values(run_cfg)
    check_groups(run_cfg)
    return run_cfg


def build_network(cfg: DictConfig) -> nn.Module:
    """Build the network of a config on the CPU, with the weights of `init_from` if that is set.

    It is a plain module, in training mode: normalised float `[n, 3, t, h, w]` → logits `[n, classes]`. If the number of
    classes is counted in the data, call `build_data(cfg)` first.
    """
    from . import build

    if cfg.model.num_classes is None:
        raise UserError("dataset.num_classes is not known: call build_data(cfg) first, or set it")
    return build.build_network(cfg)[0]


def train(*overrides: str) -> Path:
    """Train and test as `mgvideo run` does, in this process, and return the run's folder.

    A run that exists in that folder is resumed. An error that the user can fix is printed in one line and raises
    SystemExit, as in the program.
    """
    from .run import main

    folder = Path(compose(*overrides).output_dir)
    arguments = sys.argv
    try:
        main(overrides)
    finally:
        sys.argv = arguments
    return folder


def predict(
    videos: Sequence[str | Path], ckpt: str | Path, *overrides: str, top: int = 5
) -> dict[str, list[tuple[str, float]]]:
    """Return the top classes of videos with their scores, the highest first, by the path of the video.

    Args:
        videos: Files, URLs, and folders of videos.
        ckpt: A run's folder, a checkpoint, or weights, as for `mgvideo predict`.
        overrides: Changes to the config of the run; weights outside a run's folder need `model=…`.
        top: Number of classes for each video.

    Raises:
        UserError: The weights or a video cannot be read.
    """
    from .predict import PredictKeys, top_classes
    from .predictor import build_predictor, find_videos, read_class_names
    from .trained import load_trained

    trained = load_trained(str(ckpt), overrides, PredictKeys)
    predictor = build_predictor(PredictKeys(), trained, read_class_names(None, trained))
    paths = list(find_videos([str(video) for video in videos]))
    result = predictor.score_videos(paths)
    for failure in result.failures:
        raise UserError(f"{failure.path}: {failure.reason}")
    return {
        path: [(name, score) for _, name, score in top_classes(predictor, scores, top)]
        for path, scores in zip(paths, result.scores, strict=True)
    }
