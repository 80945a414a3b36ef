"""Build the objects that the core takes from a composed config. No other module knows both."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mgvideo.distributed.collectives import barrier, gather_objects, rank, rank_cpus, rank_memory, world_size
from mgvideo.distributed.process_group import local_rank
from mgvideo.engine.evaluation import Views
from mgvideo.engine.micro_batches import clips_that_fit
from mgvideo.engine.precision import Normalize, Precision, cudnn_warning, probe_convolutions
from mgvideo.engine.tasks import TASKS, Task
from mgvideo.errors import UserError
from mgvideo.layers.batchnorm import convert_group_batchnorm
from mgvideo.layers.dropout import convert_clip_dropout
from mgvideo.loading.loader import LoaderOptions
from mgvideo.loading.shared_memory import BatchSizes, check_shared_memory_space
from mgvideo.plan.options import ScheduleOptions
from mgvideo.plan.plan import Base, Grid, Plan, require
from mgvideo.plan.schedules import Schedule
from mgvideo.plan.shards import shard_batch
from mgvideo.plan.small_recipe import few_steps_warning
from mgvideo.storage.checkpoints import Checkpoints
from mgvideo.storage.paths import HUB_WEIGHTS, is_remote, require_local_path, strip_file_scheme

from .app import flat_keys
from .recipe import fill_recipe
from .training import build_task, set_crops

if TYPE_CHECKING:
    from mgvideo.datasets.sampling import Sampling

OPTION_KEYS = tuple(field.name for field in fields(ScheduleOptions))
MAX_WORKERS = 16  # default limit of worker processes per rank; loader.num_workers may exceed it; not measured yet


@dataclass(frozen=True)
class Data:
    """The training and validation datasets, their number of classes, and the task that defines their labels."""

    train: Any  # None for a run that only tests
    val: Any
    classes: int
    task: Task


def build_data(cfg: DictConfig, train: bool = True) -> Data:
    """Build the datasets, without `train` only that of the test. Set `dataset.num_classes` if it is null.

    A dataset with a `prepare` key is generated first, once per node. All ranks call this together.

    Raises:
        UserError: A key is not set, or the classes of the datasets and the config differ.
    """
    require_dataset_keys(cfg)
    if "prepare" in cfg.dataset:
        if local_rank() == 0:
            instantiate(cfg.dataset.prepare)
        barrier()
    # exact test clips: decoders shrink large frames with antialiasing
    decoders = build_decoder(cfg), build_decoder(cfg, shrink=cfg.sampling.antialias)
    training, val = _first_on_this_node(
        lambda: (
            instantiate(cfg.dataset.train, decoder=decoders[0]) if train else None,
            instantiate(cfg.dataset.val, decoder=decoders[1]),
        )
    )
    first = training or val
    if training is not None:
        set_crops(cfg, training)
    classes = len(first.class_names)
    if cfg.dataset.num_classes is None:
        OmegaConf.set_struct(cfg, False)
        cfg.dataset.num_classes = classes
    if cfg.dataset.num_classes != classes:
        raise UserError(f"dataset.num_classes={cfg.dataset.num_classes}: {first.root} has {classes} classes")
    if first.class_names != val.class_names:
        differing = sorted({*first.class_names} ^ {*val.class_names})
        example = repr(differing[0]) if differing else "their order"
        raise UserError(f"{first.root}: the classes of training and validation differ, for example in {example}")
    for dataset in (training, val):
        if dataset is not None and hasattr(dataset, "grid"):  # the shape of dataset[number]
            dataset.grid = Views.of_size(cfg.base.num_frames, cfg.base.frame_stride, cfg.base.crop_size).grid
        if dataset is not None and hasattr(dataset, "sampling"):
            dataset.sampling = build_sampling(cfg, dataset.sampling)
    task = TASKS[cfg.dataset.task]() if training is None else build_task(cfg, training, first.class_names)
    return Data(training, val, cfg.dataset.num_classes, task)


def _first_on_this_node(build: Callable[[], Any]) -> Any:
    """Return `build()`, which the first rank of each node calls before the others, who then read what it has kept.

    All ranks call this together.

    Raises:
        UserError: A first rank raised it. All ranks raise it.
    """
    result, message = None, None
    if local_rank() == 0:
        try:
            result = build()
        except (UserError, InstantiationException) as error:  # Hydra wraps the errors of a dataset
            cause = error if isinstance(error, UserError) else error.__cause__
            if not isinstance(cause, UserError):
                raise
            message = str(cause)
    failed = next(filter(None, gather_objects(message)), None)
    if failed is not None:
        raise UserError(failed)
    return build() if local_rank() else result


def unset_dataset_key(cfg: DictConfig) -> str | None:
    """Return the first key of the dataset that has no value, usually dataset.root, or None if all have one."""
    for name in flat_keys(cfg.dataset, "dataset."):
        parent, _, key = name.rpartition(".")
        if OmegaConf.is_missing(OmegaConf.select(cfg, parent), key):
            return name
    return None


def require_dataset_keys(cfg: DictConfig) -> None:
    """Raise UserError if a key of the dataset has no value. Call it before reading keys that refer to others."""
    name = unset_dataset_key(cfg)
    require(name is None, f"{name} is not set: add {name}=… to the command")


def build_sampling(cfg: DictConfig, sampling: Sampling) -> Sampling:
    """Return the sampling of a dataset with the keys of `sampling`."""
    return replace(
        sampling,
        protocol=cfg.sampling.protocol,
        target_fps=cfg.sampling.target_fps,
        antialias=cfg.sampling.antialias,
    )


def build_decoder(cfg: DictConfig, shrink: bool = True) -> Any:
    """Build the decoder, which reads from `dataset.pyramid` or `dataset.frame_cache` if one is set.

    `shrink`: whether our decoders shrink large frames while decoding, see `videofile.Decoder`.
    """
    decoder = instantiate(cfg.decoder)
    if hasattr(decoder, "shrink"):
        decoder.shrink = shrink
    if hasattr(decoder, "indexes"):
        decoder.indexes = build_indexes(cfg, cfg.dataset.get("pyramid"))
    decoder = open_any_source(cfg, decoder)
    if cfg.dataset.get("pyramid") is None:
        if cfg.dataset.get("frame_cache") is None:
            return decoder
        from mgvideo.datasets.frame_cache import FrameCache

        return FrameCache(cfg.dataset.frame_cache, decoder, cfg.dataset.frame_cache_gib)
    from mgvideo.datasets.packed_pyramid import open_pyramid

    return open_pyramid(cfg.dataset.pyramid, cfg.dataset.root, decoder)


def open_any_source(cfg: DictConfig, decoder: Any) -> Any:
    """Return a decoder that also opens folders of images and keeps copies of remote files within a limit."""
    from mgvideo.datasets.frames import FrameFolders
    from mgvideo.datasets.remote import RemoteVideos

    videos = RemoteVideos(decoder, cfg.dataset.get("cache_gib"))
    return FrameFolders(cfg.dataset.get("frames_fps", 30), videos)


def build_indexes(cfg: DictConfig, pyramid: str | None = None) -> dict[str, Any]:
    """Build the packet indexes of `dataset.index` by folder, for `indexes` of a decoder; damaged ones start anew.

    `auto` stands for one in `dataset.root` and one in the folder `pyramid`. With `dataset.frame_cache`, each video is
    opened only once, and an index is of no use.
    """
    from mgvideo.datasets.packet_index import PacketIndex, folder_index

    file = cfg.dataset.get("index")
    if file is None:
        return {}
    if file != "auto":
        indexes = {"/": PacketIndex(require_local_path("dataset.index", file))}
    elif cfg.dataset.get("frame_cache") is not None and pyramid is None:
        indexes = {}
    else:
        indexes = folder_index(cfg.dataset.root) | folder_index(pyramid)
    for index in indexes.values():
        index.check()
    return indexes


def build_plan(cfg: DictConfig, dataset_size: int) -> Plan:
    """Build the plan of `base.*` and `schedule` for a dataset of `dataset_size` videos. Compute keys that are null.

    An epoch has `augment.repeat` clips of each video.
    """
    recipe_note = fill_recipe(cfg, dataset_size)
    base: Any = OmegaConf.to_container(cfg.base, resolve=True)
    repeat, batch_size = cfg.augment.repeat, cfg.base.batch_size
    is_multiple = batch_size % repeat == 0
    require(is_multiple, f"base.batch_size={batch_size} is no multiple of augment.repeat={repeat}: change one of them")
    plan = schedule_options(cfg).apply(build_schedule(cfg))(Base(**base), dataset_size * repeat)
    require(isinstance(plan, Plan), f"schedule: {cfg.schedule._target_} returned no Plan but {type(plan).__name__}")
    notes = filter(None, (recipe_note, few_steps_warning(plan)))
    return replace(plan, notes=(*notes, *plan.notes))


def build_schedule(cfg: DictConfig) -> Schedule:
    """Build the schedule, a callable `(base, dataset_size) → Plan`, without the options that all schedules have.

    Raises:
        UserError: The keys of `schedule` are not the arguments of its function.
    """
    own_keys = copy.deepcopy(cfg.schedule)
    OmegaConf.set_struct(own_keys, False)
    for key in OPTION_KEYS:
        own_keys.pop(key, None)
    schedule = instantiate(own_keys)
    target = cfg.schedule._target_
    require(callable(schedule), f"schedule: {target} returned no function: add _partial_: true to the schedule's YAML")
    function, keys = getattr(schedule, "func", schedule), getattr(schedule, "keywords", {})  # of a functools.partial
    try:
        inspect.signature(function).bind(None, 0, **keys)
    except TypeError as error:
        raise UserError(f"schedule: {target}: {error}; change the keys of the schedule's YAML") from error
    return schedule


def schedule_options(cfg: DictConfig) -> ScheduleOptions:
    """Return the options of `schedule`; where they are null, the finish has the test's crop, on the run's GPUs."""
    options = {key: cfg.schedule[key] for key in OPTION_KEYS if key in cfg.schedule}
    if options.get("finish") is not None and options.get("finish_size") is None:
        options["finish_size"] = cfg.test.crop_size
    if options.get("gpu_count") is None:
        options["gpu_count"] = world_size()
    return ScheduleOptions(**options)


def build_model(cfg: DictConfig, precision: Precision, load_init_from: bool = True) -> nn.Module:
    """Build the network on its device, with the layers that training needs; initial weights depend only on the seed.

    A run that resumes passes `load_init_from=False`: the checkpoint replaces the weights, and the file of `init_from`
    may no longer exist.
    """
    model, summary = build_network(cfg, load_init_from)
    if summary and rank() == 0:
        print(f"init_from: {summary}")
    return precision.place(convert_clip_dropout(convert_group_batchnorm(model)))


def build_network(cfg: DictConfig, load_init_from: bool = True) -> tuple[nn.Module, str]:
    """Build the network of `model` on the CPU with the weights of `init_from`; also return what was loaded, or ""."""
    torch.manual_seed(cfg.seed)
    network: nn.Module = instantiate(cfg.model)
    if not (cfg.init_from and load_init_from):
        return network, ""
    from mgvideo.models.pretrained import load_pretrained

    weights, folder = cfg.init_from, Path(strip_file_scheme(cfg.init_from)).expanduser()
    if not is_remote(weights) and folder.is_dir():
        weights = str(best_checkpoint(folder, "init_from"))
    return network, str(load_pretrained(network, weights, key=cfg.init_from_key))


def best_checkpoint(folder: Path, key: str) -> Path:
    """Return the best checkpoint of a run's folder, or else its newest; of an exported folder, its weights.

    `key` is for the message.

    Raises:
        UserError: the folder has no checkpoints.
    """
    subfolder = folder / "checkpoints"
    if (folder / HUB_WEIGHTS).exists() and not subfolder.is_dir():
        return folder / HUB_WEIGHTS
    checkpoints = Checkpoints(subfolder if subfolder.is_dir() else folder)
    checkpoint, warnings = (checkpoints.best, []) if checkpoints.best.exists() else checkpoints.find_newest()
    for warning in warnings if rank() == 0 else []:
        print(f"warning: {warning}", file=sys.stderr)
    if checkpoint is None:
        raise UserError(f"{key}={folder}: this folder has no checkpoints; give a run's folder or a file")
    return Path(checkpoint)


def published_clip_warning(cfg: DictConfig, chosen_keys: Collection[str]) -> str | None:
    """Return a warning if clips differ in frames or stride from those that the published weights were trained with.

    Keys in `chosen_keys`, which the user set, are not compared, and neither is the stride if clips are sampled by
    segments.
    """
    if cfg.published_clip is None:
        return None
    frames, stride, size = cfg.published_clip
    published = {"base.num_frames": frames, "base.frame_stride": stride}
    if cfg.dataset.train.get("segments", False):
        del published["base.frame_stride"]
    own = {key: OmegaConf.select(cfg, key) for key in published if key not in chosen_keys}
    differing = [key for key in own if own[key] != published[key]]
    if not differing:
        return None
    settings, kept = (" ".join(f"{key}={values[key]}" for key in differing) for values in (published, own))
    trained = f"the network's published weights were trained on {frames} frames at stride {stride}, {size} pixels"
    return f"{trained}: for these weights set {settings}; {kept} keeps this run's values without a warning"


def fall_back_if_convolutions_are_wrong(
    cfg: DictConfig, model: nn.Module, plan: Plan, precision: Precision
) -> tuple[Precision, list[str]]:
    """Return the precision to train in, the same on all ranks, and warnings. All ranks call this together.

    If the gradients of convolutions are wrong on any rank, `precision=auto` becomes float32. Slow convolutions only
    cause a warning, because a rank may measure them as slow while its machine is busy.
    """
    grids = [slot.grid for phase in plan.phases for slot in phase.slots]
    all_faults = gather_objects(probe_convolutions(model, grids, precision))
    wrong, slow = (
        dict.fromkeys(fault for faults in all_faults for fault in getattr(faults, kind)) for kind in ("wrong", "slow")
    )
    name = f"torch {torch.__version__} in {precision}"
    warnings = [warning] if (warning := cudnn_warning(precision)) else []
    if slow:
        warnings.append(
            f"{name}: {'; '.join(slow)} on at least one rank; precision=fp32 or another version of torch may be faster"
        )
    if not wrong:
        return precision, warnings
    if cfg.precision != "auto":
        return precision, [
            *warnings,
            f"{name}: {'; '.join(wrong)}; set precision=fp32 or install another version of torch",
        ]
    precision = replace(precision, dtype=None, channels_last=False, reason="see the warning")
    precision.place(model)
    return precision, [f"{name}: {'; '.join(wrong)}; training in float32 instead"]


def build_normalize(cfg: DictConfig, precision: Precision) -> Normalize:
    """Build the module that normalises clips on the device."""
    return Normalize(tuple(cfg.normalize.mean), tuple(cfg.normalize.std)).to(precision.device)


def loader_options(cfg: DictConfig) -> LoaderOptions:
    """Return the options of the loader. All ranks call this together.

    If `loader.num_workers` is null, a rank uses one worker per CPU core of its own, 1 to MAX_WORKERS.

    Raises:
        UserError: A key of `loader` has an invalid value.
    """
    num_workers = cfg.loader.num_workers
    if num_workers is None:
        num_workers = max(1, min(MAX_WORKERS, int(rank_cpus())))
    methods = ("fork", "forkserver", "spawn")
    if cfg.loader.start_method not in methods:
        raise UserError(f"loader.start_method={cfg.loader.start_method}: choose one of {', '.join(methods)}")
    if num_workers < 0 or cfg.loader.prefetch_factor < 1:
        raise UserError("loader.num_workers must be 0 or more, loader.prefetch_factor 1 or more")
    low_priority = cfg.loader.low_priority
    if low_priority is None:
        low_priority = not torch.cuda.is_available()
    return LoaderOptions(
        num_workers, cfg.loader.prefetch_factor, cfg.loader.start_method, cfg.loader.timeout, low_priority
    )


def micro_batch_clips(cfg: DictConfig, model: nn.Module, plan: Plan, precision: Precision) -> int:
    """Return the number of clips of the base grid per micro-batch, the same on all ranks.

    It is `train.micro_batch_clips`; if that is null, each rank measures how many fit, and the smallest number counts.
    """
    if cfg.train.micro_batch_clips is not None:
        if cfg.train.micro_batch_clips < 1:
            raise UserError("train.micro_batch_clips must be 1 or more, or null to measure it")
        return cfg.train.micro_batch_clips
    base = plan.base
    grid = Grid(base.num_frames, base.crop_size, (base.frame_stride, base.frame_stride), base.short_side)
    return min(gather_objects(clips_that_fit(model, grid, precision, rank_memory())))


def check_shared_memory(cfg: DictConfig, plan: Plan | None, options: LoaderOptions) -> list[str]:
    """Return warnings if /dev/shm may be too small for the batches of this run. All ranks call this together.

    `plan` is None for a run that only tests.

    Raises:
        UserError: It is too small.
    """
    if options.num_workers == 0:
        return []
    base, test = cfg.base, cfg.test
    train_sizes = []
    for phase in plan.phases if plan else ():
        for slot in phase.slots:
            shard = shard_batch(slot.batch, phase.bn_groups, rank(), world_size())
            train_sizes.append(3 * slot.grid.volume * (shard.stop - shard.start))
    if plan and cfg.train.evals_per_phase:
        train_sizes.append(3 * base.num_frames * base.crop_size**2 * test.batch_size)
    test_size = 3 * base.num_frames * test.crop_size**2 * test.num_crops * test.batch_size if test.enable else 0
    return check_shared_memory_space(
        BatchSizes(max(train_sizes, default=0), test_size), options.num_workers, options.prefetch_factor
    )
