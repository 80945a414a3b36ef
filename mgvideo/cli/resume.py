"""Find and load the checkpoint that a run resumes from, which must have the same recipe, model, data and plan."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mgvideo import __version__
from mgvideo.distributed.collectives import gather_objects, rank, world_size
from mgvideo.engine.micro_batches import MAX_MEMORY_SHARE, MEMORY_SHARE, largest_step_clips
from mgvideo.engine.precision import Precision
from mgvideo.errors import UserError
from mgvideo.plan.drafts import cut_plan
from mgvideo.plan.options import ScheduleOptions
from mgvideo.plan.plan import Plan
from mgvideo.storage.checkpoints import Checkpoints, describe_differences, read_checkpoint
from mgvideo.storage.paths import is_remote, strip_file_scheme
from mgvideo.storage.remote_output import RemoteOutput

from . import app
from .build import Data
from .schema import AugmentKeys, RunKeys
from .values import flatten

TRAIN_KEYS = ("precise_bn_clips", "clip_grad_norm", "ema", "freeze")  # of train.*, which change the weights
RESTART_COUNTERS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def resume_fingerprint(cfg: DictConfig, data: Data, precision: Precision) -> dict[str, Any]:
    """Return what a resumed run must have in common with its checkpoint: all keys that affect training, and the data.

    Keys of the returned dictionary are dotted. `precision` is the one in use, because `auto` depends on the machine.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    sections = {
        key: config[key]
        for key in ("model", "schedule", "optimizer", "base", "normalize", "seed", "decoder", "sampling")
    }
    sections["schedule"] = {key: value for key, value in config["schedule"].items() if not _is_idle_option(key, value)}
    sections["model"].pop("checkpointing", None)  # changes memory and time alone
    sections["precision"] = precision.name
    sections["train"] = {name: config["train"][name] for name in TRAIN_KEYS}
    sections |= _chosen_augmentation(cfg, data)
    splits = ("train", "val")
    sections["dataset"] = {
        "task": cfg.dataset.task,
        "num_classes": data.classes,
        "pyramid": cfg.dataset.get("pyramid") is not None,
        **{
            f"{split}.{name}": cfg.dataset[split][name]
            for split in splits
            for name in ("flip", "segments")
            if name in cfg.dataset[split]
        },
        **{f"{split}.videos": len(getattr(data, split)) for split in splits},
        **{f"{split}.fingerprint": getattr(data, split).fingerprint() for split in splits},
    }
    return flatten(sections)


def _chosen_augmentation(cfg: DictConfig, data: Data) -> dict[str, Any]:
    """Return the keys of augmentation, sampler and loss that differ from their defaults, by dotted name.

    Without the defaults, checkpoints of versions that had no such keys still fit.
    """
    augment: Any = OmegaConf.to_container(cfg.augment)
    defaults = AugmentKeys()
    chosen = {f"augment.{name}": value for name, value in augment.items() if value != getattr(defaults, name)}
    if cfg.sampler != RunKeys.sampler:
        chosen["sampler"] = cfg.sampler
    if cfg.train.label_smoothing:
        chosen["train.label_smoothing"] = cfg.train.label_smoothing
    weights = data.task.class_weights
    if weights is not None:
        digest = hashlib.sha256(weights.float().cpu().numpy().tobytes()).hexdigest()[:16]
        chosen["train.class_weights"] = f"{cfg.train.class_weights} (digest {digest})"
    return chosen


def _is_idle_option(key: str, value: Any) -> bool:
    """Whether a key of the schedule has no effect: an option at its default, or one that the plan shows by itself."""
    defaults = {field.name: field.default for field in fields(ScheduleOptions)}
    return key in ("benchmark", "gpus") or (key in defaults and value == defaults[key])


def resolve_decay_from(cfg: DictConfig) -> None:
    """Set `schedule.decay_from` to the step of the checkpoint of `resume` where it is `now`.

    Raises:
        UserError: `resume` is no path, or its checkpoint cannot be read.
    """
    if cfg.schedule.get("decay_from") != "now" or cfg.resume in ("auto", "never"):
        return  # the schedule refuses `now`
    cfg.schedule.decay_from = read_checkpoint(cfg.resume)["progress"]["step"]


def find_checkpoint(cfg: DictConfig, checkpoints: Checkpoints, mirror: RemoteOutput) -> tuple[str | None, list[str]]:
    """Return the path of the checkpoint to resume from, and warnings about damaged ones that it skips.

    All ranks call this together and get the same path. It is None if the run starts anew. A job that SLURM or torchrun
    restarted continues from its own newest checkpoint, whatever `resume` is.
    """
    warnings: list[str] = []
    restarted = cfg.train.enable and any(os.environ.get(name, "0") != "0" for name in RESTART_COUNTERS)
    if cfg.resume == "auto" or restarted:
        newest, warnings = gather_objects(checkpoints.find_newest() if rank() == 0 else None)[0]
        if newest is not None:
            return mirror.source(newest), warnings
    return (None if cfg.resume in ("auto", "never") else cfg.resume), warnings


def load_checkpoint(
    cfg: DictConfig, path: str, fingerprint: dict[str, Any], versions: Mapping[str, str], plan: Plan
) -> tuple[dict[str, Any], list[str]]:
    """Return the state in a checkpoint, and warnings about differences.

    `fingerprint` and `versions` are those of this run: see `resume_fingerprint` and `software_versions`.

    Raises:
        UserError: The checkpoint cannot be read; or it has another recipe, model, dataset or plan, and
            `checkpoint.strict` is true.
    """
    state, warnings = read_checkpoint(path), []
    saved, step = state["made_of"], state["progress"]["step"]
    decay_from = fingerprint.get("schedule.decay_from")
    if (
        decay_from is not None and saved.get("schedule.decay_from") is None and step <= decay_from
    ):  # a cooldown branches
        saved = {**saved, "schedule.decay_from": decay_from}
        differences = plan_differences(state["plan"], plan, step)
    else:
        differences = plan_differences(state["plan"], plan)
    changes = [*describe_differences(saved, fingerprint), *differences]
    if changes:
        message = f"{path} has another recipe, model, dataset or plan: {'; '.join(changes)}"
        if cfg.checkpoint.strict:
            raise UserError(
                f"{message}. Restore the old values, start anew with resume=never or another output_dir, or accept the "
                "changes with checkpoint.strict=false"
            )
        warnings.append(f"{message}; continuing because checkpoint.strict=false")
        if state["progress"]["step"] > plan.steps:
            warnings.append(f"{path} is from step {state['progress']['step']}, after the last step of this plan")
    if version_changes := describe_differences(state.get("versions", {}), versions):
        warnings.append(
            f"{path} was written by other software versions: {'; '.join(version_changes)}; "
            "results may differ from now on"
        )
    return state, warnings


def plan_differences(saved: dict[str, Any], plan: Plan, stop: int | None = None) -> list[str]:
    """Describe how a saved plan differs from this one: numbers of steps and phases, and the first different phase.

    With `stop`, only the steps before it are compared.
    """
    try:
        old = Plan.from_json(saved)
    except UserError as error:
        return [f"the saved plan cannot be compared: {error}"]
    if stop is not None:
        old, plan = (_without_last_epoch(cut_plan(p, stop)) for p in (old, plan))
    if old.phases == plan.phases:
        return []
    first = next(i for i, (before, now) in enumerate(zip_longest(old.phases, plan.phases)) if before != now)
    return [
        f"the plan had {old.steps} steps in {len(old.phases)} phases, has {plan.steps} in {len(plan.phases)}",
        f"phase {first + 1} had {_describe_phase(old, first)}, has {_describe_phase(plan, first)}",
    ]


def _without_last_epoch(plan: Plan) -> Plan:
    """Return a cut plan without the last epoch, which depends on where it was cut first by rounding."""
    *phases, last = plan.phases
    return replace(plan, phases=(*phases, replace(last, epochs=(last.epochs[0], math.inf))))


def _describe_phase(plan: Plan, index: int) -> str:
    if index >= len(plan.phases):
        return "no steps"
    phase = plan.phases[index]
    first, stop = phase.steps
    batches = "/".join(str(slot.batch) for slot in phase.slots)
    grid = f"{phase.grid.frames}×{phase.grid.size}²"
    return f"steps {first}–{stop} of {batches} clips to {grid}, {phase.bn_groups} BN groups, LR ×{phase.lr_factor:g}"


def software_versions() -> dict[str, str]:
    """Return the versions of mgvideo and torch; mgvideo's includes a digest of its sources, because users edit them."""
    files = {}
    for package in map(import_module, ("mgvideo", "mgvideo.models", "mgvideo.datasets")):
        for folder in map(Path, package.__path__):
            for file in folder.rglob("*.py"):
                files[f"{package.__name__}/{file.relative_to(folder)}".replace(".", "/")] = file
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    return {"mgvideo": f"{__version__} (sources {digest.hexdigest()[:8]})", "torch": str(torch.__version__)}


def keep_micro_batch_clips(saved: Mapping[str, int] | None, measured: int, plan: Plan) -> tuple[int, str | None]:
    """Return the number of base-grid clips per micro-batch of a resumed run, and a warning if it changed.

    With the same number of ranks it is the saved number, so that results stay bit-identical. If memory holds fewer
    clips now, and the plan has steps with more, it is `measured`. `saved` holds "clips" and "ranks".
    """
    if saved is None or saved["ranks"] != world_size():
        return measured, None
    clips = saved["clips"]
    # Free memory varies between starts. The measured number leaves 40 % of it free, the saved one may leave only 20 %.
    if clips <= measured * MAX_MEMORY_SHARE / MEMORY_SHARE or largest_step_clips(plan, world_size()) <= measured:
        return clips, None
    return measured, (
        f"memory holds {measured} clips of the base grid at once now, {clips} before: micro-batches become smaller, so "
        "results may differ by rounding; larger BN groups shrink"
    )


def lower_lr_command(cfg: DictConfig, checkpoints: Checkpoints) -> str:
    """Return the command that continues this run from its newest checkpoint with half the learning rate."""
    changes = {"base.lr": f"{cfg.base.lr / 2:g}"}
    if not checkpoints.steps():
        return app.same_command(changes)
    # The default, resume=auto, finds the newest checkpoint.
    return app.same_command({**changes, "checkpoint.strict": "false"}, without=["resume"])


def archive_newer_checkpoints(
    path: str | None, state: dict[str, Any] | None, checkpoints: Checkpoints, mirror: RemoteOutput
) -> str | None:
    """Move checkpoints out of the folder that this run does not continue from; return a message if there were any.

    `path` and `state` are the checkpoint that the run resumes from, None if it starts anew.
    """
    if rank() != 0:
        return None
    if state is None or path is None:
        return checkpoints.archive_newer(0)
    folder = path.rpartition("/")[0] if is_remote(path) else str(Path(strip_file_scheme(path)).resolve().parent)
    if folder != mirror.source(checkpoints.folder):  # the checkpoints here are from another run
        return checkpoints.archive_newer(0)
    return checkpoints.archive_newer(state["progress"]["step"], state["progress"].get("best_step", 0))
