"""From a composed config to the objects that the core takes: the only place where both are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mgvideo.distributed.ranks import barrier, gather_objects, local_rank, rank, rank_cpus, rank_memory, world_size
from mgvideo.engine.micro_batches import clips_that_fit
from mgvideo.engine.precision import Normalize, Precision, cudnn_warning, probe_convolutions
from mgvideo.engine.tasks import TASKS, Task
from mgvideo.errors import UserError
from mgvideo.layers.batchnorm import convert_group_batchnorm
from mgvideo.layers.dropout import convert_clip_dropout
from mgvideo.loading.loader import LoaderOptions
from mgvideo.loading.shared_memory import BatchSizes, check_room
from mgvideo.plan.plan import Base, Grid, Plan, require
from mgvideo.plan.schedules import Schedule, make_plan
from mgvideo.plan.shards import shard_batch

from .app import flat_keys

MAX_WORKERS = 16  # processes a rank, unless loader.num_workers says more; not measured yet


@dataclass(frozen=True)
class Data:
    """Both parts of a dataset, and what a label in it is."""

    train: Any
    val: Any
    classes: int
    task: Task


def build_data(cfg: DictConfig) -> Data:
    """The datasets; one that has to be made first is made once a node. Fills in `dataset.num_classes` where null."""
    require_dataset_keys(cfg)
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


def unset_dataset_key(cfg: DictConfig) -> str | None:
    """The first key of the dataset that has no value, usually dataset.root; None where all have one."""
    for name in flat_keys(cfg.dataset, "dataset."):
        parent, _, key = name.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(cfg, parent), key):
            return name
    return None


def require_dataset_keys(cfg: DictConfig) -> None:
    """Raise UserError where a key of the dataset has no value, before other keys that refer to it are read."""
    name = unset_dataset_key(cfg)
    require(name is None, f"{name} is not set: add {name}=… to the command")


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


def fall_back_if_convolutions_are_wrong(
    cfg: DictConfig, model: nn.Module, plan: Plan, precision: Precision
) -> tuple[Precision, list[str]]:
    """The precision to train in, the same on all ranks, and warnings.

    With `precision=auto` it is float32 where the gradients of convolutions are wrong on any rank. Slow convolutions,
    which one busy rank may measure by accident, are a warning only.
    """
    grids = [slot.grid for phase in plan.phases for slot in phase.slots]
    ranks = gather_objects(probe_convolutions(model, grids, precision))
    wrong, slow = (
        dict.fromkeys(fault for faults in ranks for fault in getattr(faults, kind)) for kind in ("wrong", "slow")
    )
    name = f"torch {torch.__version__} in {precision}"
    warnings = [warning] if (warning := cudnn_warning(precision)) else []
    if slow:
        warnings.append(
            f"{name}: {'; '.join(slow)} on at least one rank; precision=fp32 or another torch may be faster"
        )
    if not wrong:
        return precision, warnings
    if cfg.precision != "auto":
        return precision, [*warnings, f"{name}: {'; '.join(wrong)}; choose precision=fp32 or another torch"]
    precision = replace(precision, dtype=None, channels_last=False, reason="see the warning")
    precision.place(model)
    return precision, [f"{name}: {'; '.join(wrong)}; training in float32 instead"]


def build_normalize(cfg: DictConfig, precision: Precision) -> Normalize:
    """Input normalisation on the device."""
    return Normalize(tuple(cfg.normalize.mean), tuple(cfg.normalize.std)).to(precision.device)


def loader_options(cfg: DictConfig) -> LoaderOptions:
    """Return how clips are loaded; where `loader.num_workers` is null, by one worker for each core of this rank.

    All ranks call it together.
    """
    workers = cfg.loader.num_workers
    if workers is None:
        workers = max(1, min(MAX_WORKERS, int(rank_cpus())))
    methods = ("fork", "forkserver", "spawn")
    if cfg.loader.start_method not in methods:
        raise UserError(f"loader.start_method={cfg.loader.start_method}: choose one of {', '.join(methods)}")
    if workers < 0 or cfg.loader.prefetch_factor < 1:
        raise UserError("loader.num_workers must be 0 or more, loader.prefetch_factor 1 or more")
    idle = not torch.cuda.is_available() if cfg.loader.low_priority is None else cfg.loader.low_priority
    return LoaderOptions(workers, cfg.loader.prefetch_factor, cfg.loader.start_method, cfg.loader.timeout, idle)


def micro_batch_clips(cfg: DictConfig, model: nn.Module, plan: Plan, precision: Precision) -> int:
    """How many base-grid clips a rank runs at once: as set, or measured, the least of all ranks."""
    if cfg.train.micro_batch_clips is not None:
        if cfg.train.micro_batch_clips < 1:
            raise UserError("train.micro_batch_clips must be 1 or more, or null to measure it")
        return cfg.train.micro_batch_clips
    base = plan.base
    grid = Grid(base.num_frames, base.crop_size, (base.frame_stride, base.frame_stride), base.short_side)
    return min(gather_objects(clips_that_fit(model, grid, precision, rank_memory())))


def check_shared_memory(cfg: DictConfig, plan: Plan, options: LoaderOptions) -> list[str]:
    """Return warnings where /dev/shm may not hold the batches of this run. All ranks call it together.

    Raises:
        UserError: it cannot hold them.
    """
    if options.num_workers == 0:
        return []
    base, test = plan.base, cfg.test
    shards = (
        (shard_batch(slot.batch, phase.bn_groups, rank(), world_size()), slot)
        for phase in plan.phases
        for slot in phase.slots
    )
    training = [3 * slot.grid.volume * (shard.stop - shard.start) for shard, slot in shards] if cfg.train.enable else []
    if cfg.train.enable and cfg.train.evals_per_phase:
        training.append(3 * base.num_frames * base.crop_size**2 * test.batch_size)
    tested = 3 * base.num_frames * test.crop_size**2 * test.num_crops * test.batch_size if test.enable else 0
    return check_room(BatchSizes(max(training, default=0), tested), options.num_workers, options.prefetch_factor)
