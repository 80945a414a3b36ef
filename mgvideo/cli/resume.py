"""Where a run begins: anew, or at a checkpoint, which has to be of the same recipe, model and data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mgvideo.checkpoint import Checkpoints, differences, read_checkpoint
from mgvideo.distributed import gather_objects, rank
from mgvideo.errors import UserError
from mgvideo.mirror import Mirror
from mgvideo.paths import is_remote, plain
from mgvideo.precision import Precision

from .build import Data

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def made_of(cfg: DictConfig, data: Data, precision: Precision) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with: every key that changes steps, and the data.

    Of `precision=auto` it is what was chosen, which another machine may choose otherwise.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    sections = {key: config[key] for key in ("model", "schedule", "optimizer", "base", "normalize", "seed", "decoder")}
    sections["precision"] = precision.name
    sections["train"] = {"precise_bn_batches": cfg.train.precise_bn_batches}
    parts = ("train", "val")
    sections["dataset"] = {
        "task": cfg.dataset.task,
        "num_classes": data.classes,
        "pyramid": cfg.dataset.get("pyramid") is not None,
        **{f"{part}.flip": cfg.dataset[part].flip for part in parts if "flip" in cfg.dataset[part]},
        **{f"{part}.videos": len(getattr(data, part)) for part in parts},
        **{f"{part}.fingerprint": getattr(data, part).fingerprint() for part in parts},
    }
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                flatten(f"{prefix}.{name}" if prefix else str(name), inner)
        else:
            flat[prefix] = value

    flatten("", sections)
    return flat


def beginning(cfg: DictConfig, checkpoints: Checkpoints, mirror: Mirror) -> tuple[str | None, list[str]]:
    """The checkpoint to go on from, the same on all ranks, None to begin anew; warnings about those passed over.

    A job that SLURM or torchrun started again goes on with what it wrote itself, wherever `resume` let it begin.
    """
    warnings: list[str] = []
    restarted = cfg.train.enable and any(os.environ.get(name, "0") != "0" for name in RESTARTS)
    if cfg.resume == "auto" or restarted:
        newest, warnings = gather_objects(checkpoints.newest() if rank() == 0 else None)[0]
        if newest is not None:
            return mirror.source(newest), warnings
    return (None if cfg.resume in ("auto", "never") else cfg.resume), warnings


def resumed(cfg: DictConfig, path: str, made: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The state in a checkpoint, and what to warn of.

    Raises:
        UserError: it cannot be read, or was made of something else, and `checkpoint.strict` is on.
    """
    state = read_checkpoint(path)
    differing = differences(state["made_of"], made)
    if not differing:
        return state, []
    told = f"{path} was made by another recipe, model or dataset: {'; '.join(differing)}"
    if cfg.checkpoint.strict:
        raise UserError(
            f"{told}. Give it back what it had, start anew with resume=never or in another output_dir, or go on "
            "regardless with checkpoint.strict=false"
        )
    return state, [f"{told}; going on regardless"]


def set_aside(path: str | None, state: dict[str, Any] | None, checkpoints: Checkpoints, mirror: Mirror) -> str | None:
    """Leave in the folder only the checkpoints that the run goes on from; the line to print where others were there."""
    if rank() != 0:
        return None
    if state is None or path is None:
        return checkpoints.rewind(0)
    folder = path.rpartition("/")[0] if is_remote(path) else str(Path(plain(path)).resolve().parent)
    if folder != mirror.source(checkpoints.folder):  # all that is here is of another run
        return checkpoints.rewind(0)
    return checkpoints.rewind(state["progress"]["step"], state["progress"].get("best_step", 0))
