"""From a composed config to the objects that the core takes: the only place where both are known."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mgvideo.batchnorm import convert_group_batchnorm
from mgvideo.distributed import barrier, gather_objects, local_rank, rank, world_size
from mgvideo.dropout import convert_clip_dropout
from mgvideo.errors import UserError
from mgvideo.loader import LoaderOptions
from mgvideo.microbatch import clips_that_fit
from mgvideo.plan import Base, Grid, Plan
from mgvideo.precision import Normalize, Precision, conv_faults
from mgvideo.schedule import Schedule, make_plan
from mgvideo.tasks import TASKS, Task


@dataclass(frozen=True)
class Data:
    """Both parts of a dataset, and what a label in it is."""

    train: Any
    val: Any
    classes: int
    task: Task


def build_data(cfg: DictConfig) -> Data:
    """The datasets; one that has to be made first is made once a node. Fills in `dataset.num_classes` where null."""
    missing = OmegaConf.missing_keys(cfg.dataset)
    if missing:  # others may refer to the one that is asked for: it has the shortest name
        key = f"dataset.{min(missing, key=len)}"
        raise UserError(f"{key} is not set: add {key}=… to the command")
    if "prepare" in cfg.dataset:
        if local_rank() == 0:
            instantiate(cfg.dataset.prepare)
        barrier()
    decoder = build_decoder(cfg)
    train = instantiate(cfg.dataset.train, decoder=decoder)
    val = instantiate(cfg.dataset.val, decoder=decoder)
    classes = len(train.class_names)
    if cfg.dataset.num_classes is None:
        OmegaConf.set_struct(cfg, False)
        cfg.dataset.num_classes = classes
    if cfg.dataset.num_classes != classes:
        raise UserError(f"dataset.num_classes={cfg.dataset.num_classes}: {train.root} has {classes} classes")
    if train.class_names != val.class_names:
        other = sorted({*train.class_names} ^ {*val.class_names}) or ["their order"]
        raise UserError(f"{train.root}: classes of training and of validation differ, in {other[0]!r} say")
    return Data(train, val, cfg.dataset.num_classes, TASKS[cfg.dataset.task]())


def build_decoder(cfg: DictConfig) -> Any:
    """The decoder; with `dataset.pyramid` or `dataset.frame_cache`, one that reads what is prepared or kept there."""
    decoder = instantiate(cfg.decoder)
    if cfg.dataset.get("pyramid") is None:
        if cfg.dataset.get("frame_cache") is None:
            return decoder
        from mgvideo.datasets.frame_cache import FrameCache

        return FrameCache(cfg.dataset.frame_cache, decoder, cfg.dataset.frame_cache_gib)
    from mgvideo.datasets.pyramid import Pyramid

    return Pyramid(cfg.dataset.pyramid, cfg.dataset.root, decoder)


def build_plan(cfg: DictConfig, dataset_size: int) -> Plan:
    """The plan of `base.*` and `schedule`."""
    base: Any = OmegaConf.to_container(cfg.base, resolve=True)
    schedule: Schedule = instantiate(cfg.schedule)
    return make_plan(Base(**base), schedule, dataset_size)


def build_model(cfg: DictConfig, precision: Precision, anew: bool = True) -> nn.Module:
    """The network as the trainer takes it, on its device; weights depend on the seed alone.

    Where it does not begin `anew`, a checkpoint's weights are to follow, and `init_from` may be gone by now.
    """
    torch.manual_seed(cfg.seed)
    model: nn.Module = instantiate(cfg.model)
    if cfg.init_from and anew:
        from mgvideo.models.pretrained import load_pretrained

        taken = load_pretrained(model, cfg.init_from, key=cfg.init_from_key)
        if rank() == 0:
            print(f"init_from: {taken}")
    return precision.place(convert_clip_dropout(convert_group_batchnorm(model)))


def trusted(cfg: DictConfig, model: nn.Module, plan: Plan, precision: Precision) -> tuple[Precision, list[str]]:
    """The precision, or float32 where `precision=auto` chose what this torch gets wrong, and what to warn of."""
    grids = [slot.grid for phase in plan.phases for slot in phase.slots]
    faults = [fault for part in gather_objects(conv_faults(model, grids, precision)) for fault in part]
    if not faults:
        return precision, []
    told = f"torch {torch.__version__} in {precision}: {'; '.join(dict.fromkeys(faults))}"
    if cfg.precision != "auto":
        return precision, [f"{told}; choose precision=fp32 or another torch"]
    precision = replace(precision, dtype=None, channels_last=False, why="see the warning")
    precision.place(model)
    return precision, [f"{told}; training in float32 instead"]


def build_normalize(cfg: DictConfig, precision: Precision) -> Normalize:
    """Input normalisation on the device."""
    return Normalize(tuple(cfg.normalize.mean), tuple(cfg.normalize.std)).to(precision.device)


def loader_options(cfg: DictConfig) -> LoaderOptions:
    """Workers: as many as there are cores to each rank of this node, at most 8, unless set."""
    workers = cfg.loader.workers
    if workers is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = max(1, min(8, len(os.sched_getaffinity(0)) // ranks))
    methods = ("fork", "forkserver", "spawn")
    if cfg.loader.start_method not in methods:
        raise UserError(f"loader.start_method={cfg.loader.start_method}: choose one of {', '.join(methods)}")
    if workers < 0 or cfg.loader.prefetch < 1:
        raise UserError("loader.workers must be 0 or more, loader.prefetch 1 or more")
    idle = not torch.cuda.is_available() if cfg.loader.idle is None else cfg.loader.idle
    return LoaderOptions(workers, cfg.loader.prefetch, cfg.loader.start_method, cfg.loader.timeout, idle)


def max_clips(
    cfg: DictConfig, model: nn.Module, plan: Plan, precision: Precision, saved: Mapping[str, int] | None = None
) -> int:
    """Base-grid clips that a rank holds at once: as set, as saved by as many ranks, or measured, the least of all.

    Where BN groups shrink to what fits, and in the last bits of every sum, the result depends on it: a resumed run
    keeps to what it began with, however much memory is free today.
    """
    if cfg.loader.max_clips_per_step is not None:
        if cfg.loader.max_clips_per_step < 1:
            raise UserError("loader.max_clips_per_step must be 1 or more, or null to measure it")
        return cfg.loader.max_clips_per_step
    if saved and saved["ranks"] == world_size():
        return saved["clips"]
    base = plan.base
    grid = Grid(base.frames, base.size, (base.stride, base.stride), base.jitter)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(gather_objects(clips_that_fit(model, grid, precision, ranks)))
