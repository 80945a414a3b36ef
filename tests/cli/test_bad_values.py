"""Invalid values: every key of the schema rejects values of the wrong type or range in one line, with exit code 2."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from refusals import error_line
from training import TINY

from mgvideo.cli.run import main
from mgvideo.cli.schema import RunKeys

WRONG_TYPE = {"int": "many", "float": "much", "bool": "perhaps", "list[int]": "wide", "list[float]": "wide"}
STRINGS = {
    "model_option",
    "output_dir",
    "init_from",
    "init_from_key",
    "resume",
    "base.lr_policy",
}  # strings: any value has the right type
WRONG_VALUES = [
    *(
        "base.batch_size=0",
        "base.num_frames=0",
        "base.crop_size=-1",
        "base.frame_stride=0",
        "base.short_side=[40]",
        "base.short_side=[40,36]",
    ),
    *("base.epochs=0", "base.lr=-1", "base.lr=nan", "base.lr_milestones=[0]", "base.lr_milestones=[9]", "base.gamma=0"),
    *("base.warmup_epochs=-1", "base.warmup_epochs=9", "base.warmup_lr=-1", "base.warmup_by=clips"),
    *("base.lr_policy=linear", "base.final_lr=-1", "base.final_lr=9"),
    *("recipe.jitter=none", "recipe.weight_decay=-1", "recipe.lr_scaling=cubic"),
    *("train.log_every=0", "train.evals_per_phase=-1", "train.precise_bn_clips=-1"),
    *("train.clip_grad_norm=0", "train.ema=1", "train.ema=-1"),
    *("test.num_clips=0", "test.num_crops=2", "test.crop_size=0", "test.batch_size=0"),
    *("loader.num_workers=-1", "loader.prefetch_factor=0", "loader.start_method=thread", "loader.timeout=0"),
    *("train.label_smoothing=2", "sampler=random", "augment.repeat=0", "augment.repeat=3"),
    *("augment.mix_prob=2", "augment.crop_area=[1,0.5]", "augment.randaugment_magnitude=11"),
    *("sampling.protocol=reference", "sampling.target_fps=0", "sampling.target_fps=nan"),
    *("loader.timeout=inf", "train.micro_batch_clips=0"),
    *("checkpoint.every_steps=-1", "checkpoint.every_minutes=-1", "checkpoint.every_minutes=nan", "checkpoint.keep=0"),
    *("normalize.mean=[0.5]", "normalize.mean=[0,0,nan]", "normalize.std=[1,1,0]", "precision=fp8", "seed=-1"),
    *("compile=perhaps", "tracking=comet", "published_clip=[8,2]", "published_clip=[8,2,0]"),
    *("hang_timeout=-1", "resume=/nowhere/step.pt", "init_from=/nowhere/weights.pt"),
]
TYPES = {
    f"{block.name}.{key.name}" if is_dataclass(default) else block.name: str(key.type)
    for block in fields(RunKeys)
    for default in [block.default_factory() if callable(block.default_factory) else block.default]
    for key in (fields(default) if is_dataclass(default) else [block])
    if str(key.type) != "Any"
}

# Keys of the config groups: values of a type that the group's target does not declare, and values out of range. And
# train.freeze, whose values have several types.
GROUP_VALUES = [
    *("train.freeze=stage9", "train.freeze=[stem,9]", "train.freeze=3"),
    *("model.dropout=x", "model.dropout=2", "model.dropout=nan", "model.width=x", "model.width=2.5"),
    *(
        "model=i3d_r50 model.depth=51",
        "model=slowfast_4x16_r50 model.alpha=x",
        "model=i3d_nln_r50 model.nonlocal_mode=7",
    ),
    *("model=slowfast_4x16_r50 model.beta_inv=true", "model=slowfast_4x16_r50 model.fusion_kernel=x"),
    *("model._target_=mgvideo.nowhere", "model.num_classes=x"),
    *(
        "schedule.bn_group=x",
        "schedule.bn_group=0",
        "schedule.jitter=7",
        "schedule.fine_tune=1",
        "schedule.lr_scaling=true",
    ),
    *("schedule.long_factors=x", "schedule.long_factors=[0.5]", "schedule.short_factors=[2]"),
    *("optimizer.momentum=x", "optimizer.momentum=-1", "optimizer.nesterov=maybe", "optimizer.nesterov=1"),
    *(
        "optimizer.momentum=0",
        "optimizer.weight_decay=x",
        "optimizer.weight_decay=-1",
        "optimizer.decay_norm_and_bias=x",
        "optimizer.layer_decay=0.5",
        "optimizer=adamw optimizer.betas=[1]",
        "optimizer=lamb optimizer.eps=0",
    ),
    *("dataset.task=x", "dataset.max_bad_fraction=x", "dataset.max_bad_fraction=-1", "dataset.frame_cache_gib=x"),
    *("dataset.frame_cache_gib=-1", "dataset.num_classes=x", "dataset.num_classes=0", "dataset.num_classes=9"),
    *("dataset.pyramid=7", "dataset.pyramid=/nowhere", "dataset.frame_cache=/proc/none"),
    *("dataset.knobs.train=x", "dataset.knobs.crf=x", "dataset.knobs.turning=x"),
    *("dataset.train.split=7", "dataset.val.split=7", "dataset=kinetics400 dataset.train.flip=x"),
    *("train.class_weights=[1]", "train.class_weights=/nowhere.csv"),
    *("dataset=folder dataset.train.val_share=x", "dataset=hmdb51 dataset.train.fold=x"),
]


def test_every_key_of_the_schema_is_tested() -> None:
    with_wrong_value = {override.split("=")[0] for override in WRONG_VALUES}
    with_wrong_type = {name for name, kind in TYPES.items() if kind.removesuffix(" | None") in WRONG_TYPE}
    assert set(TYPES) == with_wrong_value | with_wrong_type | STRINGS


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.removesuffix(" | None") in WRONG_TYPE])
def test_value_of_the_wrong_type_is_reported_in_one_line(name: str, capsys: pytest.CaptureFixture) -> None:
    wrong = WRONG_TYPE[TYPES[name].removesuffix(" | None")]
    assert name in error_line(main, [f"{name}={wrong}"], capsys)


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_value_out_of_range_is_reported_in_one_line(
    wrong: str, capsys: pytest.CaptureFixture, tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key, value = wrong.split("=")
    line = error_line(main, [*TINY, f"dataset.root={motion_root}", "output_dir=out", wrong], capsys)
    assert key in line or value in line


@pytest.mark.parametrize("wrong", GROUP_VALUES)
def test_invalid_value_in_a_group_is_reported_in_one_line(
    wrong: str, capsys: pytest.CaptureFixture, tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    *group, override = wrong.split()
    tiny = [word for word in TINY if not group or not word.startswith(group[0].split("=")[0])]
    line = error_line(main, [*tiny, f"dataset.root={motion_root}", "output_dir=out", *group, override], capsys)
    assert line.startswith(f"error: {override.split('.')[0]}") or override.split("=")[1] in line
