"""Where a run begins: anew, or at a checkpoint, which has to be of the same recipe, model and data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mgvideo import __version__
from mgvideo.distributed.ranks import gather_objects, rank, world_size
from mgvideo.engine.micro_batches import MAX_MEMORY_SHARE, MEMORY_SHARE, largest_step_clips
from mgvideo.engine.precision import Precision
from mgvideo.errors import UserError
from mgvideo.plan.plan import Plan
from mgvideo.storage.checkpoints import Checkpoints, differences, read_checkpoint
from mgvideo.storage.paths import is_remote, plain
from mgvideo.storage.remote_output import RemoteOutput

from . import app
from .build import Data

RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def resume_fingerprint(cfg: DictConfig, data: Data, precision: Precision) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on with: every key that changes steps, and the data.

    Of `precision=auto` it is what was chosen, which another machine may choose otherwise.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    sections = {key: config[key] for key in ("model", "schedule", "optimizer", "base", "normalize", "seed", "decoder")}
    sections["precision"] = precision.name
    sections["train"] = {"precise_bn_clips": cfg.train.precise_bn_clips}
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


def find_checkpoint(cfg: DictConfig, checkpoints: Checkpoints, mirror: RemoteOutput) -> tuple[str | None, list[str]]:
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


def load_checkpoint(
    cfg: DictConfig, path: str, made: dict[str, Any], versions: Mapping[str, str], plan: Plan
) -> tuple[dict[str, Any], list[str]]:
    """The state in a checkpoint, and warnings.

    Raises:
        UserError: it cannot be read; or it is of another recipe, model, dataset or plan, and `checkpoint.strict` is on.
    """
    state, warnings = read_checkpoint(path), []
    differing = [*differences(state["made_of"], made), *plan_differences(state["plan"], plan)]
    if differing:
        message = f"{path} was made by another recipe, model, dataset or plan: {'; '.join(differing)}"
        if cfg.checkpoint.strict:
            raise UserError(
                f"{message}. Set them back, start anew with resume=never or in another output_dir, or accept the "
                "differences with checkpoint.strict=false"
            )
        warnings.append(f"{message}; continuing, since checkpoint.strict=false")
        if state["progress"]["step"] > plan.steps:
            warnings.append(f"{path} is of step {state['progress']['step']}, after the last step of this plan")
    if changed := differences(state.get("versions", {}), versions):
        warnings.append(f"{path} was written by other software: {'; '.join(changed)}; results may differ from here on")
    return state, warnings


def plan_differences(saved: dict[str, Any], plan: Plan) -> list[str]:
    """What differs between a saved plan and this one: the number of steps and phases, and the first other phase."""
    try:
        old = Plan.from_json(saved)
    except UserError as error:
        return [f"its plan cannot be compared: {error}"]
    if old.phases == plan.phases:
        return []
    first = next(i for i, (was, now) in enumerate(zip_longest(old.phases, plan.phases)) if was != now)
    return [
        f"the plan had {old.steps} steps in {len(old.phases)} phases, has {plan.steps} in {len(plan.phases)}",
        f"phase {first + 1} had {_phase_text(old, first)}, has {_phase_text(plan, first)}",
    ]


def _phase_text(plan: Plan, index: int) -> str:
    if index >= len(plan.phases):
        return "no steps"
    phase = plan.phases[index]
    first, stop = phase.steps
    batches = "/".join(str(slot.batch) for slot in phase.slots)
    grid = f"{phase.grid.frames}×{phase.grid.size}²"
    return f"steps {first}–{stop} of {batches} clips to {grid}, {phase.bn_groups} BN groups, LR ×{phase.lr_factor:g}"


def software_versions() -> dict[str, str]:
    """Versions of mgvideo, with a digest of its sources, which people edit in a checkout, and of torch."""
    files = {}
    for package in map(import_module, ("mgvideo", "mgvideo.models", "mgvideo.datasets")):
        for folder in map(Path, package.__path__):
            for file in folder.rglob("*.py"):
                files[f"{package.__name__}/{file.relative_to(folder)}".replace(".", "/")] = file
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    return {"mgvideo": f"{__version__} (sources {digest.hexdigest()[:8]})", "torch": str(torch.__version__)}


def keep_micro_batch_clips(saved: Mapping[str, int] | None, fits: int, plan: Plan) -> tuple[int, str | None]:
    """How many base-grid clips a rank of a resumed run runs at once, and a warning; `fits` is what was measured now.

    With as many ranks as before it is the saved number, so that the run stays the same to the last bit. Where memory
    holds fewer now, and steps of the plan are larger than that, it is the measured number.
    """
    if saved is None or saved["ranks"] != world_size():
        return fits, None
    kept = saved["clips"]
    # The free memory of a machine varies; the measured number leaves 40 % of it free, the saved one may leave 20 %.
    if kept <= fits * MAX_MEMORY_SHARE / MEMORY_SHARE or largest_step_clips(plan, world_size()) <= fits:
        return kept, None
    return fits, (
        f"memory holds {fits} clips of the base grid at once now, not {kept} as before: micro-batches become smaller, "
        "so that sums may differ in their last bits; BN groups of more clips than that shrink"
    )


def lower_lr_command(cfg: DictConfig, checkpoints: Checkpoints) -> str:
    """The command that continues this run from its newest checkpoint with half the learning rate."""
    changes = {"base.lr": f"{cfg.base.lr / 2:g}"}
    if not checkpoints.steps():
        return app.same_command(changes)
    # resume=auto finds the newest checkpoint; resume=never or a path say where the run began
    return app.same_command({**changes, "checkpoint.strict": "false"}, without=["resume"])


def archive_newer_checkpoints(
    path: str | None, state: dict[str, Any] | None, checkpoints: Checkpoints, mirror: RemoteOutput
) -> str | None:
    """Leave in the folder only the checkpoints that the run goes on from; the line to print where others were there."""
    if rank() != 0:
        return None
    if state is None or path is None:
        return checkpoints.rewind(0)
    folder = path.rpartition("/")[0] if is_remote(path) else str(Path(plain(path)).resolve().parent)
    if folder != mirror.source(checkpoints.folder):  # all that is here is of another run
        return checkpoints.rewind(0)
    return checkpoints.rewind(state["progress"]["step"], state["progress"].get("best_step", 0))
