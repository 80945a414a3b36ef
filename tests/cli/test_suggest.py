"""What a wrong key is answered with."""

from __future__ import annotations

import re

import pytest
from refusals import said

from mgvideo.cli import app
from mgvideo.cli.help import group_options
from mgvideo.cli.run import main
from mgvideo.cli.suggest import OTHERWISE, SAME, suggestion


@pytest.fixture(scope="module")
def keys() -> set[str]:
    """Every key that some choice of groups has."""
    found = set(group_options())
    for group in ("model", "dataset", "schedule", "optimizer", "decoder"):
        for option in group_options()[group]:
            found |= set(app.flat_keys(app.compose_config("run", [f"{group}={option}"])))
    return found


def test_every_suggestion_is_a_key_and_no_name_is_one(keys: set[str]) -> None:
    assert SAME.keys() <= keys
    for sentence in OTHERWISE:
        named = re.findall(r"[a-z_]+(?:\.[a-z_]+)+(?==|,|\s)", sentence)
        assert set(named) - {"slurm.md"} <= keys, sentence
    names = [name for names in (*SAME.values(), *OTHERWISE.values()) for name in names.split()]
    assert len(names) == len(set(names)), sorted(name for name in set(names) if names.count(name) > 1)
    assert not keys & set(names)
    assert all(name == name.lower().replace("-", "_") for name in names)


def test_what_is_said_not_to_be_there_is_not(keys: set[str]) -> None:
    parts = {key.rpartition(".")[2] for key in keys}
    assert not parts & {name for names in OTHERWISE.values() for name in names.split()}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("batch_size=4", "did you mean base.batch_size?"),
        ("lr=0.01", "did you mean base.lr?"),
        ("optimizer.clip=1", "there is no gradient clipping"),
        ("TRAIN.BATCH_SIZE=8", "did you mean base.batch_size?"),
        ("TEST.BATCH_SIZE=8", "did you mean test.batch_size?"),
        ("SOLVER.BASE_LR=0.1", "did you mean base.lr?"),
        ("SOLVER.MAX_EPOCH=9", "did you mean base.epochs?"),
        ("DATA.NUM_FRAMES=8", "did you mean base.num_frames?"),
        ("DATA.PATH_TO_DATA_DIR=/d", "did you mean dataset.root?"),
        ("MULTIGRID.LONG_CYCLE=true", "did you mean schedule?"),
        ("NUM_GPUS=8", "torchrun --nproc-per-node"),
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
        ("optimizer.weight_dacay=1", "did you mean optimizer.weight_decay?"),
        ("datset.root=/d/a=b", "did you mean dataset.root?"),
        ("TRAIN.BATCH_SIZE", "did you mean base.batch_size?"),
        ("--batch-size=4", "did you mean base.batch_size? Keys are given as key=value"),
        ("--fast", "--fast is no flag: Keys are given as key=value"),
    ],
)
def test_a_wrong_key_is_answered_with_the_one_that_was_meant(
    wrong: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in said(main, [wrong], capsys)


def test_where_nothing_is_near_nothing_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("zzz=1", "optimizer.rho=1", "swish=1"):
        line = said(main, [wrong], capsys)
        assert line == f"error: {wrong[:-2]} is no key of this config; --cfg job prints them all"


def test_the_keys_of_a_program_are_near_too() -> None:
    assert suggestion("gpu", ["base.lr"], ["gpus"]) == ", did you mean gpus?"
    assert suggestion("clip", ["base.lr"], ["clips"]) == ", did you mean clips?"
    assert suggestion("learning_rate", ["base.lr"], ["clips"]) == ", did you mean base.lr?"
