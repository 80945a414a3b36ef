"""Every key of the schema with what its type or its meaning forbids: one line that names it, and exit code 2."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from refusals import said
from training import TINY

from mgvideo.cli.run import main
from mgvideo.cli.schema import RunKeys

WRONG_TYPE = {"int": "many", "float": "much", "bool": "perhaps", "list[int]": "wide", "list[float]": "wide"}
FREE = {"output_dir", "init_from", "resume", "base.lr_policy"}  # texts, whose wrong values are below
WRONG_VALUES = [
    *("base.batch=0", "base.frames=0", "base.size=-1", "base.stride=0", "base.jitter=[40]", "base.jitter=[40,36]"),
    *("base.epochs=0", "base.lr=-1", "base.lr=nan", "base.lr_steps=[1]", "base.lr_steps=[0,9]", "base.gamma=0"),
    *("base.warmup_epochs=-1", "base.warmup_epochs=9", "base.warmup_lr=-1", "base.lr_policy=linear"),
    *("train.log_every=0", "train.evals_per_phase=-1", "train.precise_bn_batches=-1"),
    *("test.clips=0", "test.crops=2", "test.size=0", "test.batch=0"),
    *("loader.workers=-1", "loader.prefetch=0", "loader.start_method=thread", "loader.timeout=0"),
    *("loader.timeout=inf", "loader.max_clips_per_step=0"),
    *("checkpoint.every_steps=-1", "checkpoint.every_minutes=-1", "checkpoint.every_minutes=nan", "checkpoint.keep=0"),
    *("normalize.mean=[0.5]", "normalize.mean=[0,0,nan]", "normalize.std=[1,1,0]", "precision=fp8", "seed=-1"),
    "compile=perhaps",
    *("hang_timeout=-1", "resume=/nowhere/step.pt", "init_from=/nowhere/weights.pt"),
]
TYPES = {
    f"{block.name}.{one.name}" if is_dataclass(default) else block.name: str(one.type)
    for block in fields(RunKeys)
    for default in [block.default_factory() if callable(block.default_factory) else block.default]
    for one in (fields(default) if is_dataclass(default) else [block])
    if str(one.type) != "Any"
}


def test_every_key_has_a_wrong_value_or_a_wrong_type() -> None:
    tried = {wrong.split("=")[0] for wrong in WRONG_VALUES}
    typed = {name for name, kind in TYPES.items() if kind.removesuffix(" | None") in WRONG_TYPE}
    assert set(TYPES) == tried | typed | FREE


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.removesuffix(" | None") in WRONG_TYPE])
def test_a_wrong_type_is_one_line(name: str, capsys: pytest.CaptureFixture) -> None:
    wrong = WRONG_TYPE[TYPES[name].removesuffix(" | None")]
    assert name in said(main, [f"{name}={wrong}"], capsys)


@pytest.mark.parametrize("wrong", WRONG_VALUES)
def test_a_wrong_value_is_one_line(
    wrong: str, capsys: pytest.CaptureFixture, tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key, value = wrong.split("=")
    line = said(main, [*TINY, f"dataset.root={motion_root}", "output_dir=out", wrong], capsys)
    assert key in line or value in line
