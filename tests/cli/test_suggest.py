"""The suggestion in the error message for an unknown key."""

from __future__ import annotations

import re

import pytest
from refusals import error_line

from mgvideo.cli import app
from mgvideo.cli.help import group_options
from mgvideo.cli.run import main
from mgvideo.cli.suggest import NOT_A_KEY, OTHER_NAMES, suggestion


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """The keys of every option of the config groups, together."""
    keys = set(group_options())
    for group in ("model", "dataset", "schedule", "optimizer", "decoder"):
        for option in group_options()[group]:
            keys |= set(app.flat_keys(app.compose_config("run", [f"{group}={option}"])))
    return keys


def test_tables_suggest_only_keys_that_exist(keys: set[str]) -> None:
    assert OTHER_NAMES.keys() <= keys
    for sentence in NOT_A_KEY:
        mentioned = re.findall(r"[a-z_]+(?:\.[a-z_]+)+(?==|,|;|\s)", sentence)
        assert set(mentioned) - {"slurm.md"} <= keys, sentence


def test_tables_list_each_name_once(keys: set[str]) -> None:
    names = [name for names in (*OTHER_NAMES.values(), *NOT_A_KEY.values()) for name in names.split()]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == ["size"], "base.crop_size, test.crop_size"
    assert not keys & set(names)
    assert all(name == name.lower().replace("-", "_") for name in names)


def test_names_of_missing_features_are_not_part_of_a_key(keys: set[str]) -> None:
    parts = {key.rpartition(".")[2] for key in keys}
    assert not parts & {name for names in NOT_A_KEY.values() for name in names.split()}


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("batch_size=4", "did you mean base.batch_size?"),
        ("lr=0.01", "did you mean base.lr?"),
        ("optimizer.clip=1", "did you mean train.clip_grad_norm?"),
        ("TRAIN.BATCH_SIZE=8", "did you mean base.batch_size?"),
        ("TEST.BATCH_SIZE=8", "did you mean test.batch_size?"),
        ("SOLVER.BASE_LR=0.1", "did you mean base.lr?"),
        ("SOLVER.MAX_EPOCH=9", "did you mean base.epochs?"),
        ("DATA.NUM_FRAMES=8", "did you mean base.num_frames?"),
        ("DATA.PATH_TO_DATA_DIR=/d", "did you mean dataset.root?"),
        ("MULTIGRID.LONG_CYCLE=true", "did you mean schedule?"),
        ("NUM_GPUS=8", "torchrun --nproc-per-node"),
        ("mixup_alpha=0.8", "did you mean augment.mixup_alpha?"),
        ("RandAugment=4", "did you mean augment.randaugment_ops?"),
        ("epochs=9", "did you mean base.epochs?"),
        ("num_workers=4", "did you mean loader.num_workers?"),
        ("weight_decay=0", "did you mean optimizer.weight_decay?"),
        ("weight-decay=0", "did you mean optimizer.weight_decay?"),
        ("momentum=0", "did you mean optimizer.momentum?"),
        ("gpus=2", "torchrun --nproc-per-node"),
        ("resume_from=x", "did you mean resume?"),
        ("pretrained=x", "did you mean init_from?"),
        ("amp=true", "did you mean precision?"),
        ("size=64", "did you mean base.crop_size or test.crop_size?"),
        ("base.batchh=1", "did you mean base.batch_size?"),
        ("base.batch=1", "did you mean base.batch_size?"),
        ("test.batch=1", "did you mean test.batch_size?"),
        ("base.size=64", "did you mean base.crop_size?"),
        ("test.size=64", "did you mean test.crop_size?"),
        ("DATA.TRAIN_CROP_SIZE=64", "did you mean base.crop_size?"),
        ("crop_size=64", "did you mean base.crop_size or test.crop_size?"),
        ("loader.workers=2", "did you mean loader.num_workers?"),
        ("loader.max_clips_per_step=8", "did you mean train.micro_batch_clips?"),
        ("test.clips=1", "did you mean test.num_clips?"),
        ("base.jitter=[256,320]", "did you mean base.short_side?"),
        ("optimizer.weight_dacay=1", "did you mean optimizer.weight_decay?"),
        ("datset.root=/d/a=b", "did you mean dataset.root?"),
        ("TRAIN.BATCH_SIZE", "did you mean base.batch_size?"),
        ("--batch-size=4", "did you mean base.batch_size?; write keys as key=value"),
        ("--fast", "--fast is not a flag; write keys as key=value"),
    ],
)
def test_error_suggests_the_key_that_was_meant(argument: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in error_line(main, [argument], capsys)


def test_error_suggests_nothing_if_no_key_is_similar(capsys: pytest.CaptureFixture[str]) -> None:
    for argument in ("zzz=1", "optimizer.rho=1", "swish=1"):
        line = error_line(main, [argument], capsys)
        assert line == f"error: {argument[:-2]} is not a key of this config; --cfg job prints all keys"


def test_suggestion_includes_the_keys_of_the_program() -> None:
    assert suggestion("gpu", ["base.lr"], ["gpus"]) == ", did you mean gpus?"
    assert suggestion("clip", ["base.lr"], ["clips"]) == ", did you mean clips?"
    assert suggestion("learning_rate", ["base.lr"], ["clips"]) == ", did you mean base.lr?"
