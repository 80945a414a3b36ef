"""What each config key of PySlowFast is here: the table behind `mgvideo from_pyslowfast` and docs/pyslowfast.md.

Names and defaults are those of PySlowFast's slowfast/config/defaults.py. The kinds of rules are in
`pyslowfast_rules`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from omegaconf import OmegaConf

from mgvideo.models.resnet import BLOCKS

from .help import group_options
from .pyslowfast_augmentation import AUGMENTATION_RULES, ONLY_AUGMENT_KEYS
from .pyslowfast_rules import Rule, Settings, Translation, absent, computed, copied, equal, no_effect, part_of
from .yaml_keys import find_option

TARGETS = {  # MODEL.ARCH → function of our network
    "slowfast": "mgvideo.models.slowfast.slowfast",
    "slow": "mgvideo.models.i3d.slow",
    "slowonly": "mgvideo.models.i3d.slow",
    "i3d": "mgvideo.models.i3d.i3d",
    "c2d": "mgvideo.models.i3d.c2d",
    "r2plus1d": "mgvideo.models.r2plus1d.r2plus1d_bottleneck",
}
NOT_TRANSLATED = {  # MODEL.ARCH → options of `model` whose configs are not translated
    "x3d": "x3d_xs, x3d_s, x3d_m, x3d_l",
    "mvit": "mvit_v1_b, mvit_v2_s, mvit_v2_b",
}
KINETICS = {600: "kinetics600", 700: "kinetics700"}  # classes → dataset; other numbers are kinetics400's
DATASETS = ("kinetics", "charades", "ssv2")
STAGES = ("res2", "res3", "res4", "res5")
SPATIAL_STRIDES = (1, 2, 2, 2)  # of the stages of every ResNet here


# Networks


def choose_network(arch: str, settings: Settings) -> Translation:
    """Choose the option of `model` that differs least from a network, and the keys in which it differs."""
    if arch in NOT_TRANSLATED:
        reason = f"configs of this network are not translated yet: choose model={NOT_TRANSLATED[arch]}"
        return Translation(reason=reason, blocks=True)
    if arch not in TARGETS:
        names = ", ".join(sorted(TARGETS))
        return Translation(reason=f"this network is not there yet; there are {names}", blocks=True)
    wanted = _network_keys(arch, settings)
    if isinstance(wanted, str):
        return Translation(reason=f"this network is not there, because {wanted}", blocks=True)
    candidates = []
    for option in group_options()["model"]:
        keys = _option_keys(option)
        if keys["_target_"] != TARGETS[arch] or (keys.get("nonlocal_blocks") and not wanted["nonlocal_blocks"]):
            continue
        changes = {
            f"{'' if name in keys else '+'}model.{name}": value
            for name, value in wanted.items()
            if not equal(keys.get(name) or {}, value or {})
        }
        other_clip = settings["DATA.NUM_FRAMES"] != (keys["published_clip"] or [None])[0]
        candidates.append((len(changes), other_clip, option, changes))
    _, _, option, changes = min(candidates)
    return Translation({"model": option, **changes})


def _option_keys(option: str) -> dict[str, Any]:
    """Return the keys of an option of `model`, and its `published_clip`."""
    file = find_option(f"model/{option}")
    assert file is not None
    content: Any = OmegaConf.to_container(OmegaConf.load(file))
    return {"published_clip": content.get("published_clip"), **content.get("model", content)}


def _network_keys(arch: str, settings: Settings) -> dict[str, Any] | str:
    """Return the keys of our network for a config, or why there is no such network."""
    depth = settings["RESNET.DEPTH"]
    if depth not in BLOCKS:
        return f"RESNET.DEPTH is {depth}; there are {', '.join(map(str, BLOCKS))}"
    keys = {"width": settings["RESNET.WIDTH_PER_GROUP"], "depth": depth, "dropout": settings["MODEL.DROPOUT_RATE"]}
    blocks, fast_blocks = _nonlocal_blocks(settings)
    if fast_blocks or (blocks and arch not in ("slowfast", "i3d")):
        return "NONLOCAL.LOCATION: only I3D and the slow pathway of SlowFast have non-local blocks"
    keys["nonlocal_blocks"] = blocks
    if blocks:
        keys["nonlocal_mode"] = settings["NONLOCAL.INSTANTIATION"]
    temporal_depth = _temporal_depth(depth, settings["RESNET.NUM_BLOCK_TEMP_KERNEL"])
    if temporal_depth == 0 or (temporal_depth and arch not in ("slowfast", "c2d")):
        return "RESNET.NUM_BLOCK_TEMP_KERNEL makes neither all blocks temporal nor, in SlowFast, those of a ResNet-50"
    if arch == "slowfast":
        keys["temporal_depth"] = temporal_depth
        keys["alpha"], keys["beta_inv"] = settings["SLOWFAST.ALPHA"], settings["SLOWFAST.BETA_INV"]
        keys["fusion_kernel"] = settings["SLOWFAST.FUSION_KERNEL_SZ"]
    return keys


def _nonlocal_blocks(settings: Settings) -> tuple[dict[str, list[int]], bool]:
    """Return the non-local blocks of the first pathway by stage, and whether another pathway has some."""
    location = settings["NONLOCAL.LOCATION"]
    blocks = {stage: list(pathways[0]) for stage, pathways in zip(STAGES, location, strict=False) if pathways[0]}
    return blocks, any(pathway for pathways in location for pathway in pathways[1:])


def _temporal_depth(depth: int, limits: Sequence[Sequence[int]]) -> int | None:
    """Return the depth of the ResNet whose number of temporal blocks each stage has; None: `depth`; 0: no such one."""
    by_pathway = list(zip(*limits, strict=True))
    counts = [tuple(map(min, pathway, BLOCKS[depth])) for pathway in by_pathway]
    if all(count == BLOCKS[depth] for count in counts):
        return None
    return next((other for other, blocks in BLOCKS.items() if all(count == blocks for count in counts)), 0)


def _check_stages(values: Sequence[int], name: str) -> Callable[[Any, Settings], Translation]:
    def check(value: Any, _: Settings) -> Translation:
        if all(equal(pathway, [number] * len(pathway)) for pathway, number in zip(value, values, strict=False)):
            return Translation()
        return Translation(reason=f"this network is not there: {name} of its stages are {list(values)}", blocks=True)

    return check


# Datasets


def dataset_option(settings: Settings) -> str:
    """Return the option of `dataset` for a config."""
    name = settings["TRAIN.DATASET"]
    return KINETICS.get(settings["MODEL.NUM_CLASSES"], "kinetics400") if name == "kinetics" else name


def choose_dataset(name: str, settings: Settings) -> Translation:
    """Choose the dataset, and the keys for its files."""
    if name not in DATASETS:
        reason = f"this dataset is not there; there are {', '.join(DATASETS)}, and dataset=folder for your own"
        return Translation(reason=reason, blocks=True)
    task = "multi_label" if settings["DATA.MULTI_LABEL"] else "single_label"
    overrides = {"dataset": dataset_option(settings), "dataset.num_classes": settings["MODEL.NUM_CLASSES"]}
    reason = "the test reads val.csv too, where PySlowFast reads test.csv" if name == "kinetics" else ""
    return Translation({**overrides, "dataset.task": task, **_files(name, settings)}, reason)


def _files(name: str, settings: Settings) -> dict[str, str]:
    """Return the keys for the folder of a dataset, its lists and its videos."""
    folder, prefix = settings["DATA.PATH_TO_DATA_DIR"], settings["DATA.PATH_PREFIX"]
    root = folder or "FOLDER"
    if name == "kinetics" and prefix:
        lists = {
            f"dataset.{split}.list_file": os.path.join(os.path.abspath(folder), f"{split}.csv")
            for split in ("train", "val")
        }
        return {"dataset.root": prefix, **(lists if folder else {})}
    if name == "charades" and (folder or prefix):
        lists = {f"dataset.{split}.annotations": f"{split}.csv" for split in ("train", "val")}
        videos = {f"dataset.{split}.videos": os.path.abspath(prefix) for split in ("train", "val") if prefix}
        return {"dataset.root": root, **lists, **videos}
    return {"dataset.root": root}


def _path_prefix(prefix: str, settings: Settings) -> Translation:
    if prefix and settings["TRAIN.DATASET"] == "ssv2":
        return Translation(reason="not there, because Something-Something is read from its videos, not from frames")
    return Translation()


def _flip(flips: bool, settings: Settings) -> Mapping[str, Any] | Translation:
    if settings["TRAIN.DATASET"] != "ssv2":
        return {"dataset.train.flip": flips}
    reason = "not there, because clips of Something-Something are never mirrored: some of its labels have a direction"
    return Translation(reason=reason if flips else "")


def _inverse_jitter(inverse: bool, settings: Settings) -> Translation:
    if inverse == (settings["TRAIN.DATASET"] == "charades"):
        return Translation()
    drawn = "the inverse of the short side" if not inverse else "the short side"
    return Translation(reason=f"not there, because this dataset draws {drawn} uniformly")


def _target_fps(fps: float, settings: Settings) -> Mapping[str, Any] | Translation:
    if settings["TRAIN.DATASET"] == "kinetics":
        return {"sampling.target_fps": fps}
    return Translation(reason="has no effect, as in PySlowFast, which counts the frames of this dataset")


def _ensemble(method: str, settings: Settings) -> Translation:
    ours = "max" if settings["DATA.MULTI_LABEL"] else "sum"
    kind = "several labels" if settings["DATA.MULTI_LABEL"] else "one label"
    because = f"scores of views are {'maximised' if ours == 'max' else 'averaged'} where videos have {kind}"
    return Translation(reason="" if method == ours else f"not there, because {because}")


def _loss(name: str, settings: Settings) -> Translation:
    ours = ("bce", "bce_logit") if settings["DATA.MULTI_LABEL"] else ("soft_cross_entropy", "cross_entropy")
    reason = f"not there, because the loss follows DATA.MULTI_LABEL: {ours[-1]}"
    return Translation(reason="" if name in ours else reason)


def _activation(name: str, settings: Settings) -> Translation:
    ours = "sigmoid" if settings["DATA.MULTI_LABEL"] else "softmax"
    reason = f"not there, because the scores follow DATA.MULTI_LABEL: {ours}"
    return Translation(reason="" if name == ours else reason)


# Schedules and recipes


def schedule_option(settings: Settings) -> str:
    """Return the option of `schedule` for a config."""
    cycles = bool(settings["MULTIGRID.LONG_CYCLE"]), bool(settings["MULTIGRID.SHORT_CYCLE"])
    return {(True, True): "multigrid", (True, False): "long", (False, True): "short"}.get(cycles, "baseline")


def _of_schedules(key: str, *schedules: str) -> Callable[[Any, Settings], Translation]:
    """Return a function that translates to `key` if the config has one of the schedules."""

    def translate(value: Any, settings: Settings) -> Translation:
        if schedule_option(settings) in schedules:
            return Translation({key: _plain(value)})
        return Translation(reason=f"has no effect here, because schedule={schedule_option(settings)} does not use it")

    return translate


def _plain(value: Any) -> Any:
    """Return a value with lists for tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _bn_group(base_size: int, settings: Settings) -> Translation:
    """BN_BASE_SIZE with the long cycle; without it, as many clips as PySlowFast's norm type takes together."""
    if settings["MULTIGRID.LONG_CYCLE"]:
        return Translation({"schedule.bn_group": base_size})
    clips = settings["TRAIN.BATCH_SIZE"] // max(1, settings["NUM_GPUS"])
    if settings["BN.NORM_TYPE"] == "sync_batchnorm":
        clips *= settings["BN.NUM_SYNC_DEVICES"]
    elif settings["BN.NORM_TYPE"] == "sub_batchnorm":
        clips //= settings["BN.NUM_SPLITS"]
    return Translation({"schedule.bn_group": max(1, clips)})


def _shards(settings: Settings) -> int:
    return max(1, settings["NUM_SHARDS"])


def _batch_size(batch: int, settings: Settings) -> dict[str, Any]:
    samples = settings["AUG.NUM_SAMPLE"] if settings["AUG.ENABLE"] else 1
    return {"base.batch_size": batch * _shards(settings) * samples}


def _scaled_lr(key: str) -> Callable[[Any, Settings], Mapping[str, Any]]:
    def translate(lr: float, settings: Settings) -> Mapping[str, Any]:
        return {key: lr * (_shards(settings) if settings["SOLVER.BASE_LR_SCALE_NUM_SHARDS"] else 1)}

    return translate


def _optimizer(method: str, settings: Settings) -> Translation:
    if method not in ("sgd", "adamw"):
        return Translation(reason="not there, because the optimizers are sgd, adamw and lamb", blocks=True)
    if method == "sgd":
        return Translation()
    linear = {"schedule.lr_scaling": "linear"} if settings["MULTIGRID.LONG_CYCLE"] else {}
    return Translation({"optimizer": "adamw", **linear})


def _of_optimizer(method: str, key: str) -> Callable[[Any, Settings], Mapping[str, Any]]:
    """Return a function that translates to `key` if the config has that optimizer."""
    return lambda value, settings: {key: _plain(value)} if settings["SOLVER.OPTIMIZING_METHOD"] == method else {}


def _of_cosine(key: str) -> Callable[[Any, Settings], Mapping[str, Any]]:
    """Return a function that translates to `key` if the LR is a cosine."""
    return lambda value, settings: {key: value} if settings["SOLVER.LR_POLICY"] == "cosine" else {}


def _final_lr(lr: float, settings: Settings) -> Mapping[str, Any]:
    is_cosine = settings["SOLVER.LR_POLICY"] == "cosine" and lr
    return _scaled_lr("base.final_lr")(lr, settings) if is_cosine else {}


def _clip_grad_norm(norm: float | None, settings: Settings) -> Mapping[str, Any]:
    return {"train.clip_grad_norm": norm} if norm else {}


def _layer_decay(decay: float, settings: Settings) -> Mapping[str, Any]:
    return {} if decay == 1 else {"optimizer.layer_decay": decay}


def milestones(settings: Settings) -> list[float]:
    """Return SOLVER.STEPS without the 0."""
    return [step for step in settings["SOLVER.STEPS"] if step > 0]


def _lr_policy(name: str, settings: Settings) -> Translation:
    policies = {"steps_with_relative_lrs": "step", "cosine": "cosine"}
    if name not in policies:
        return Translation(reason=f"not there, because base.lr_policy is one of {', '.join(policies)}", blocks=True)
    overrides = {"base.lr_policy": policies[name], "base.lr_milestones": milestones(settings)}
    warped = name == "cosine" and settings["MULTIGRID.LONG_CYCLE"]
    reason = "under the long cycle, the cosine here is that of the equivalent baseline epoch" if warped else ""
    return Translation(overrides, reason)


def _relative_lrs(lrs: Sequence[float], settings: Settings) -> Translation:
    if settings["SOLVER.LR_POLICY"] == "cosine":
        return Translation(reason="has no effect here, because a cosine has no milestones" if lrs else "")
    if settings["MULTIGRID.LONG_CYCLE"]:
        return Translation(reason="has no effect, as in PySlowFast, whose long cycle uses SOLVER.GAMMA" if lrs else "")
    used = lrs[: 1 + len(milestones(settings))]
    ratios = [after / before for before, after in pairwise(used)]
    if len(used) < 1 + len(milestones(settings)):
        reason = f"has {len(lrs)} values for the {1 + len(milestones(settings))} stages of SOLVER.STEPS"
    elif used[0] == 1 and equal(ratios, ratios[:1] * len(ratios)):
        return Translation({"base.gamma": ratios[0]} if ratios else {})
    else:
        reason = "not there, because every milestone multiplies the LR by the same base.gamma"
    return Translation(reason=reason, blocks=True)


def _gamma(gamma: float, settings: Settings) -> Translation:
    if settings["MULTIGRID.LONG_CYCLE"]:
        return Translation({"base.gamma": gamma})
    return Translation(reason="has no effect, as in PySlowFast without the long cycle, which uses SOLVER.LRS")


def _weight_decay_of_norms(decay: float, settings: Settings) -> Translation:
    others = settings["SOLVER.WEIGHT_DECAY"]
    if equal(decay, others) and not settings["SOLVER.ZERO_WD_1D_PARAM"]:
        return Translation({"optimizer.decay_norm_and_bias": True})
    if decay == 0:
        bias = "" if settings["SOLVER.ZERO_WD_1D_PARAM"] else "biases are not decayed either, which PySlowFast decays"
        return Translation({"optimizer.decay_norm_and_bias": False}, bias)
    return Translation(reason="not there, because normalisation has the weight decay of other layers, or none")


def _precise_bn(is_on: bool, settings: Settings) -> dict[str, Any]:
    clips = settings["BN.NUM_BATCHES_PRECISE"] * settings["TRAIN.BATCH_SIZE"] * _shards(settings)
    return {"train.precise_bn_clips": clips if is_on else 0}


def _evals(period: int, settings: Settings) -> Translation:
    """Return about as many validations as one every `period` epochs."""
    if settings["MULTIGRID.LONG_CYCLE"]:
        return Translation(reason="has no effect, as in PySlowFast with the long cycle, which uses MULTIGRID.EVAL_FREQ")
    factor = settings["MULTIGRID.EPOCH_FACTOR"] if settings["MULTIGRID.SHORT_CYCLE"] else 1
    evals = factor * settings["SOLVER.MAX_EPOCH"] / period / (1 + len(milestones(settings)))
    return Translation({"train.evals_per_phase": max(1, round(evals))})


# Test and machine


def _test_batch(batch: int, settings: Settings) -> dict[str, Any]:
    return {"test.batch_size": max(1, batch // max(1, settings["NUM_GPUS"]))}


def _crops(crops: int, _: Settings) -> Translation:
    if crops in (1, 3):
        return Translation({"test.num_crops": crops})
    return Translation(reason="not there, because a clip has 1 or 3 crops")


def _init_from(path: str, settings: Settings) -> Translation:
    if not path:
        return Translation()
    continues = settings["TRAIN.ENABLE"] and not settings["TRAIN.CHECKPOINT_EPOCH_RESET"]
    reason = "training starts at epoch 0 with these weights" if continues else ""
    return Translation({"init_from": path}, reason)


def _tested_weights(path: str, settings: Settings) -> Translation:
    if path and settings["TRAIN.ENABLE"]:
        return Translation(reason="not there, because after training, its own weights are tested")
    return Translation({"init_from": path} if path else {})


def _same_dataset(name: str, settings: Settings) -> Translation:
    is_same = name == settings["TRAIN.DATASET"]
    return Translation(reason="" if is_same else "not there, because the test uses the dataset of the training")


def _output_dir(path: str, _: Settings) -> Translation:
    if os.path.normpath(path) == ".":
        return Translation(reason="has no effect here, because each run has a folder of its own below runs/")
    return Translation({"output_dir": path})


RULES: dict[str, Rule] = {
    # the order is that of the words of the command: groups first
    "MODEL.ARCH": computed("chooses `model`, with the other keys of the network", choose_network, "slowfast"),
    "TRAIN.DATASET": computed("`dataset`, and `dataset.root` with DATA.PATH_TO_DATA_DIR", choose_dataset, "kinetics"),
    "MULTIGRID.LONG_CYCLE": computed(
        "`schedule=long`; with MULTIGRID.SHORT_CYCLE `schedule=multigrid`; `schedule=baseline` for neither",
        lambda _, settings: {"schedule": schedule_option(settings)},
        False,
    ),
    "MULTIGRID.SHORT_CYCLE": part_of("`schedule=short`; with MULTIGRID.LONG_CYCLE `schedule=multigrid`", False),
    "MULTIGRID.EPOCH_FACTOR": computed(
        "`schedule.epoch_factor`", _of_schedules("schedule.epoch_factor", "multigrid", "long", "short"), 1.5
    ),
    "MULTIGRID.LONG_CYCLE_FACTORS": computed(
        "`schedule.long_factors`",
        _of_schedules("schedule.long_factors", "multigrid", "long"),
        [[0.25, 0.5**0.5], [0.5, 0.5**0.5], [0.5, 1.0], [1.0, 1.0]],
    ),
    "MULTIGRID.SHORT_CYCLE_FACTORS": computed(
        "`schedule.short_factors`", _of_schedules("schedule.short_factors", "multigrid", "short"), [0.5, 0.5**0.5]
    ),
    "MULTIGRID.BN_BASE_SIZE": computed("`schedule.bn_group`", _bn_group, 8),
    "MULTIGRID.EVAL_FREQ": computed(
        "`train.evals_per_phase`", _of_schedules("train.evals_per_phase", "multigrid", "long"), 3
    ),
    "MULTIGRID.LONG_CYCLE_SAMPLING_RATE": no_effect("PySlowFast sets it itself"),
    "MULTIGRID.DEFAULT_B": no_effect("PySlowFast sets it itself"),
    "MULTIGRID.DEFAULT_T": no_effect("PySlowFast sets it itself"),
    "MULTIGRID.DEFAULT_S": no_effect("PySlowFast sets it itself"),
    "TRAIN.ENABLE": copied("train.enable", True),
    "TRAIN.BATCH_SIZE": computed("`base.batch_size`, over all machines", _batch_size, 64),
    "TRAIN.EVAL_PERIOD": computed("`train.evals_per_phase`, about as many validations", _evals),
    "TRAIN.CHECKPOINT_PERIOD": no_effect("a run saves at each phase's end and every `checkpoint.every_minutes`"),
    "TRAIN.AUTO_RESUME": computed(
        "`resume=auto`, `resume=never`", lambda value, _: {"resume": "auto" if value else "never"}, True
    ),
    "TRAIN.CHECKPOINT_FILE_PATH": computed("`init_from`", _init_from, ""),
    "TRAIN.CHECKPOINT_TYPE": no_effect("`init_from` recognises files by the names of their tensors"),
    "TRAIN.CHECKPOINT_INFLATE": no_effect("`init_from` inflates image networks by itself"),
    "TRAIN.CHECKPOINT_EPOCH_RESET": part_of("only `True`: `init_from` starts at epoch 0", False),
    "TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN": no_effect("`init_from` removes prefixes of names by itself"),
    "TRAIN.CHECKPOINT_IN_INIT": absent("`init_from` loads complete networks", off=False),
    "TRAIN.MIXED_PRECISION": computed(
        "`precision=auto`, `precision=fp32`", lambda value, _: {"precision": "auto" if value else "fp32"}
    ),
    "TRAIN.KILL_LOSS_EXPLOSION_FACTOR": absent("a run stops only at a loss that is not finite", off=0.0),
    "DATA.NUM_FRAMES": copied("base.num_frames", 8),
    "DATA.SAMPLING_RATE": copied("base.frame_stride", 8),
    "DATA.TRAIN_CROP_SIZE": copied("base.crop_size", 224),
    "DATA.TRAIN_JITTER_SCALES": copied("base.short_side", [256, 320]),
    "DATA.TEST_CROP_SIZE": copied("test.crop_size", 256),
    "DATA.MEAN": copied("normalize.mean", [0.45, 0.45, 0.45]),
    "DATA.STD": copied("normalize.std", [0.225, 0.225, 0.225]),
    "DATA.PATH_TO_DATA_DIR": part_of("`dataset.root`, or the folder of the lists if DATA.PATH_PREFIX is set", ""),
    "DATA.PATH_PREFIX": computed(
        "`dataset.root` for Kinetics, `dataset.train.videos` and `dataset.val.videos` for Charades", _path_prefix, ""
    ),
    "DATA.PATH_LABEL_SEPARATOR": no_effect("separators of lists are recognised"),
    "DATA.DECODING_BACKEND": computed(
        "`decoder=pyav`", lambda value, _: {"decoder": value if value in ("pyav", "decord", "torchcodec") else "pyav"}
    ),
    "DATA.RANDOM_FLIP": computed("`dataset.train.flip`; never for Something-Something", _flip, True),
    "DATA.MULTI_LABEL": part_of("`dataset.task=multi_label`, `dataset.task=single_label`", False),
    "DATA.INV_UNIFORM_SAMPLE": computed(
        "as `True` for Charades, as `False` for other datasets", _inverse_jitter, False
    ),
    "DATA.ENSEMBLE_METHOD": computed("`max` where videos have several labels, else the mean", _ensemble, "sum"),
    "DATA.INPUT_CHANNEL_NUM": no_effect("clips have three channels, and a network takes its pathways' frames itself"),
    "DATA.REVERSE_INPUT_CHANNEL": no_effect("clips are always RGB"),
    "DATA.TARGET_FPS": computed("`sampling.target_fps` for Kinetics", _target_fps, 30),
    "DATA.TRAIN_PCA_EIGVAL": no_effect(ONLY_AUGMENT_KEYS),
    "DATA.TRAIN_PCA_EIGVEC": no_effect(ONLY_AUGMENT_KEYS),
    "DATA.TRAIN_JITTER_MOTION_SHIFT": absent(ONLY_AUGMENT_KEYS, off=False),
    "DATA.TRAIN_JITTER_FPS": absent("`sampling.target_fps` is one rate", off=0.0),
    "DATA.COLOR_RND_GRAYSCALE": absent(ONLY_AUGMENT_KEYS, off=0.0),
    "DATA.TIME_DIFF_PROB": absent(ONLY_AUGMENT_KEYS, off=0.0),
    "DATA.USE_OFFSET_SAMPLING": absent("test clip k of K starts at k / K of the video", off=False),
    "DATA.TRAIN_CROP_NUM_TEMPORAL": absent("a sample is one clip", off=1),
    "DATA.TRAIN_CROP_NUM_SPATIAL": absent("a sample is one crop", off=1),
    "DATA.PATH_TO_PRELOAD_IMDB": absent("there is no ImageNet training", off="", shown="an empty path"),
    "DATA.IN22K_TRAINVAL": absent("there is no ImageNet training", off=False),
    "DATA.IN22k_VAL_IN1K": absent("there is no ImageNet training", off="", shown="an empty path"),
    "DATA.SKIP_ROWS": absent("every row of a list is read", off=0),
    "DATA.LOADER_CHUNK_SIZE": no_effect("lists are read at once"),
    "DATA.LOADER_CHUNK_OVERALL_SIZE": no_effect("lists are read at once"),
    "DATA.DUMMY_LOAD": absent("`tools/benchmark.py step` measures steps without data", off=False),
    "DATA.SSL_*": absent("there is no self-supervised training"),
    "SOLVER.BASE_LR": computed("`base.lr`", _scaled_lr("base.lr"), 0.1),
    "SOLVER.LR_POLICY": computed(
        "`base.lr_policy=step` for steps_with_relative_lrs, `base.lr_policy=cosine`", _lr_policy, "cosine"
    ),
    "SOLVER.STEPS": part_of("`base.lr_milestones`, without the 0", []),
    "SOLVER.LRS": computed("`base.gamma`, the ratio of two values", _relative_lrs, []),
    "SOLVER.GAMMA": computed("`base.gamma` with MULTIGRID.LONG_CYCLE", _gamma, 0.1),
    "SOLVER.MAX_EPOCH": copied("base.epochs", 300),
    "SOLVER.WARMUP_EPOCHS": copied("base.warmup_epochs", 0.0),
    "SOLVER.WARMUP_START_LR": computed("`base.warmup_lr`", _scaled_lr("base.warmup_lr"), 0.01),
    "SOLVER.WARMUP_FACTOR": no_effect("SOLVER.WARMUP_START_LR sets the first LR, in PySlowFast too"),
    "SOLVER.STEP_SIZE": no_effect("no LR policy uses it in PySlowFast either"),
    "SOLVER.BASE_LR_SCALE_NUM_SHARDS": part_of("`base.lr` times NUM_SHARDS", False),
    "SOLVER.COSINE_END_LR": computed("`base.final_lr`", _final_lr, 0.0),
    "SOLVER.COSINE_AFTER_WARMUP": computed("`base.cosine_after_warmup`", _of_cosine("base.cosine_after_warmup"), False),
    "SOLVER.OPTIMIZING_METHOD": computed("`optimizer=adamw`, `optimizer=sgd`", _optimizer, "sgd"),
    "SOLVER.MOMENTUM": computed("`optimizer.momentum` of sgd", _of_optimizer("sgd", "optimizer.momentum"), 0.9),
    "SOLVER.DAMPENING": absent("SGD has no dampening", off=0.0),
    "SOLVER.NESTEROV": computed("`optimizer.nesterov` of sgd", _of_optimizer("sgd", "optimizer.nesterov"), True),
    "SOLVER.WEIGHT_DECAY": copied("optimizer.weight_decay", 1e-4),
    "SOLVER.ZERO_WD_1D_PARAM": part_of("`optimizer.decay_norm_and_bias=false`", False),
    "SOLVER.BETAS": computed("`optimizer.betas` of adamw", _of_optimizer("adamw", "optimizer.betas"), [0.9, 0.999]),
    "SOLVER.CLIP_GRAD_VAL": absent("gradients are clipped by their norm, with `train.clip_grad_norm`"),
    "SOLVER.CLIP_GRAD_L2NORM": computed("`train.clip_grad_norm`", _clip_grad_norm),
    "SOLVER.LARS_ON": absent("there is no LARS", off=False),
    "SOLVER.LAYER_DECAY": computed("`optimizer.layer_decay`", _layer_decay, 1.0),
    "BN.WEIGHT_DECAY": computed("`optimizer.decay_norm_and_bias=false` for 0", _weight_decay_of_norms, 0.0),
    "BN.USE_PRECISE_STATS": computed("`train.precise_bn_clips`, 0 for `False`", _precise_bn, False),
    "BN.NUM_BATCHES_PRECISE": part_of("`train.precise_bn_clips`: clips, not batches", 200),
    "BN.NORM_TYPE": part_of("`schedule.bn_group`, whatever the number of GPUs", "batchnorm"),
    "BN.NUM_SPLITS": part_of("`schedule.bn_group`, whatever the number of GPUs", 1),
    "BN.NUM_SYNC_DEVICES": part_of("`schedule.bn_group`, whatever the number of GPUs", 1),
    "BN.GLOBAL_SYNC": no_effect("groups of `schedule.bn_group` clips are synchronised across GPUs"),
    "BN.MOMENTUM": absent("batch norm has that of the published networks", off=0.1),
    "BN.EPSILON": absent("batch norm has that of the published networks", off=1e-5),
    "RESNET.DEPTH": part_of("`model.depth`", 50),
    "RESNET.WIDTH_PER_GROUP": part_of("`model.width`", 64),
    "RESNET.NUM_GROUPS": absent("ResNeXt is not there yet", off=1, blocks=True),
    "RESNET.TRANS_FUNC": absent("ResNets here have bottlenecks", off="bottleneck_transform", blocks=True),
    "RESNET.STRIDE_1X1": absent("the stride is on the 3×3 convolution", off=False, blocks=True),
    "RESNET.ZERO_INIT_FINAL_BN": absent(
        "the last batch norm of each block starts at 0, as published", off=True, default=False
    ),
    "RESNET.ZERO_INIT_FINAL_CONV": absent("convolutions start as He et al. do", off=False),
    "RESNET.INPLACE_RELU": no_effect("it changes only memory"),
    "RESNET.NUM_BLOCK_TEMP_KERNEL": part_of("chooses `model`", [[3], [4], [6], [3]]),
    "RESNET.SPATIAL_STRIDES": computed(
        "only `[[1, 1], [2, 2], [2, 2], [2, 2]]`", _check_stages(SPATIAL_STRIDES, "the spatial strides")
    ),
    "RESNET.SPATIAL_DILATIONS": computed(
        "only `[[1, 1], [1, 1], [1, 1], [1, 1]]`", _check_stages((1, 1, 1, 1), "the dilations")
    ),
    "SLOWFAST.ALPHA": part_of("`model.alpha`", 8),
    "SLOWFAST.BETA_INV": part_of("`model.beta_inv`", 8),
    "SLOWFAST.FUSION_CONV_CHANNEL_RATIO": absent("lateral connections have that of the paper", off=2, blocks=True),
    "SLOWFAST.FUSION_KERNEL_SZ": part_of("`model.fusion_kernel`", 5),
    "NONLOCAL.LOCATION": part_of("`model.nonlocal_blocks`", [[[]], [[]], [[]], [[]]]),
    "NONLOCAL.INSTANTIATION": part_of("`model.nonlocal_mode`", "dot_product"),
    "NONLOCAL.GROUP": computed("only `1`", _check_stages((1, 1, 1, 1), "the groups of the non-local blocks")),
    "NONLOCAL.POOL": absent(
        "keys and values are pooled 2×2", off=[[[1, 2, 2], [1, 2, 2]]] * 4, shown="`[1, 2, 2]` everywhere"
    ),
    "MODEL.MODEL_NAME": no_effect("MODEL.ARCH names the network"),
    "MODEL.NUM_CLASSES": part_of("`dataset.num_classes`", 400),
    "MODEL.LOSS_FUNC": computed("follows `dataset.task`", _loss, "cross_entropy"),
    "MODEL.HEAD_ACT": computed("follows `dataset.task`", _activation),
    "MODEL.DROPOUT_RATE": part_of("`model.dropout`", 0.5),
    "MODEL.DROPCONNECT_RATE": absent("the networks have no drop path", off=0.0),
    "MODEL.FC_INIT_STD": absent("the last layer starts as published", off=0.01),
    "MODEL.SINGLE_PATHWAY_ARCH": no_effect("a network takes its pathways' frames itself"),
    "MODEL.MULTI_PATHWAY_ARCH": no_effect("a network takes its pathways' frames itself"),
    "MODEL.ACT_CHECKPOINT": no_effect("micro-batches (`train.micro_batch_clips`) save memory instead"),
    "MODEL.FROZEN_BN": absent("batch norm is always trained", off=False),
    "MODEL.DETACH_FINAL_FC": absent("all layers are trained", off=False),
    "MODEL.FP16_ALLREDUCE": no_effect("gradients are reduced in float32"),
    "TEST.ENABLE": copied("test.enable", True),
    "TEST.DATASET": computed("only that of TRAIN.DATASET", _same_dataset),
    "TEST.BATCH_SIZE": computed("`test.batch_size`, on each rank", _test_batch),
    "TEST.CHECKPOINT_FILE_PATH": computed("`init_from`, with `train.enable=false`", _tested_weights, ""),
    "TEST.CHECKPOINT_TYPE": no_effect("`init_from` recognises files by the names of their tensors"),
    "TEST.NUM_ENSEMBLE_VIEWS": copied("test.num_clips", 10),
    "TEST.NUM_SPATIAL_CROPS": computed("`test.num_crops`", _crops, 3),
    "TEST.NUM_TEMPORAL_CLIPS": absent("a test has one number of clips, `test.num_clips`", off=[]),
    "TEST.SAVE_RESULTS_PATH": no_effect("a test writes predictions.csv into the run's folder"),
    "DATA_LOADER.NUM_WORKERS": copied("loader.num_workers", text=", on each rank"),
    "DATA_LOADER.PIN_MEMORY": no_effect("memory is always pinned on a GPU"),
    "DATA_LOADER.ENABLE_MULTI_THREAD_DECODE": no_effect("a worker decodes with one thread"),
    "NUM_GPUS": part_of("`torchrun --nproc-per-node=8 tools/run_net.py`", 1),
    "NUM_SHARDS": part_of("torchrun's `--nnodes`, or [SLURM](slurm.md)", 1),
    "SHARD_ID": no_effect("torchrun and SLURM number the machines"),
    "RNG_SEED": copied("seed"),
    "OUTPUT_DIR": computed("`output_dir`; for `.` a folder below runs/", _output_dir),
    "LOG_PERIOD": copied("train.log_every"),
    "LOG_MODEL_INFO": no_effect("`python -m mgvideo.models.table` prints parameters and FLOPs"),
    "DIST_BACKEND": no_effect("GPUs use NCCL, CPUs Gloo"),
    **AUGMENTATION_RULES,
    "X3D.*": absent("configs of X3D are not translated yet: `model=x3d_m` and its like have its networks"),
    "MVIT.*": absent("configs of MViT are not translated yet: `model=mvit_v2_s` and its like have its networks"),
    "MASK.*": absent("there is no self-supervised training"),
    "CONTRASTIVE.*": absent("there is no self-supervised training"),
    "TASK": absent("there is no self-supervised training", off="", shown="an empty name"),
    "VIS_MASK.*": absent("there is no self-supervised training"),
    "DETECTION.ENABLE": absent("there is no detection", off=False, blocks=True),
    "DETECTION.*": absent("there is no detection"),
    "AVA.*": absent("there is no detection"),
    "DEMO.*": no_effect("`tools/predict.py` predicts and draws videos"),
    "TENSORBOARD.*": no_effect("TensorBoard is always written"),
    "BENCHMARK.*": no_effect("`tools/benchmark.py loader` has its own keys"),
}
DEFAULTS = {key: rule.default for key, rule in RULES.items() if rule.default is not None}


def find_rule(key: str) -> Rule | None:
    """Return the rule of a key: its own, or that of the block it is in; None if PySlowFast has no such key."""
    parts = key.split("_")
    blocks = [f"{key.partition('.')[0]}.*", *(f"{'_'.join(parts[:n])}_*" for n in range(1, len(parts)))]
    return RULES.get(key) or next((RULES[block] for block in blocks if block in RULES), None)
