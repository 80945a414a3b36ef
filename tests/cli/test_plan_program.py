"""`mgvideo plan` on a laptop: no videos, no weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hydra.utils import instantiate
from refusals import said

from mgvideo.cli import app
from mgvideo.cli.plan import clip_flops, main, read_keys, show
from mgvideo.errors import UserError
from mgvideo.plan import Grid

PROGRAM = Path(__file__).parents[2] / "tools/plan.py"


def shown(own: list[str], overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    show(read_keys(own), app.compose_config("run", overrides))
    return capsys.readouterr().out


def test_program() -> None:
    arguments = ("videos=1024", "gpus=2", "schedule=short", "step_time=0.1")
    result = subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Plan: short, 1,024 clips on 2 GPUs" in result.stdout
    assert "fewer FLOPs" in result.stdout
    assert "What the loaders must deliver" in result.stdout


def test_wrong_values_give_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(main, ["gpus=zero"], capsys).startswith("error: gpus")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["videos=1024", "format=json", "at=[0,14.9]", "step_time=0.1", "gpus=2"]
    told = json.loads(shown(own, ["schedule=multigrid"], capsys))
    assert told["max_epoch"] == 30
    assert [epoch for epoch, _ in told["lr_at_epoch"]] == [0, 14.9]
    assert sum(phase["steps"] for phase in told["phases"]) == told["steps"]
    assert sum(phase["cost_share"] for phase in told["phases"]) == pytest.approx(1)
    assert told["seconds"] == pytest.approx(0.1 * told["steps"])
    assert told["saving"]["flops"] > 2


def test_prediction_from_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = tmp_path / "benchmark.json"
    benchmark.write_text(json.dumps({"step_seconds": {"16x64": 1.0}, "clips_per_second": {"16x64": 4.0}, "workers": 2}))
    text = shown(["videos=160", "gpus=1", f"benchmark={benchmark}"], ["schedule=baseline"], capsys)
    assert "predicted time of training: 13:20 min" in text  # 200 steps of 16 clips at 4 clips a second
    assert "waits 75% of its time for data: 4.0× as many workers a GPU (8 instead of 2)" in text


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(["videos=1024", "format=png", f"out={tmp_path / 'plan.png'}"], [], capsys)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_flops_agree_with_fvcore() -> None:
    """Ours counts shapes alone; fvcore runs the network, and counts its pooling and norms too."""
    cfg = app.compose_config("run", [])
    model = instantiate(cfg.model).eval()
    theirs = FlopCountAnalysis(model, torch.zeros(1, 3, 8, 45, 45)).unsupported_ops_warnings(False).total()
    assert clip_flops(cfg)(Grid(8, 45, (1, 1), (45, 45))) == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["gpus=0"], "gpus"),
        (["format=pdf"], "format"),
        (["format=png"], "out"),
        (["videos=0"], "videos"),
        (["step_time=-1"], "step_time"),
        (["step_time=1", "benchmark=b.json"], "benchmark"),
        (["at=soon"], "at"),
    ],
)
def test_senseless_keys_are_refused(arguments: list[str], key: str) -> None:
    with pytest.raises(UserError, match=key):
        read_keys(arguments)


def test_unknown_number_of_videos_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="videos="):
        shown([], ["dataset=kinetics400"], capsys)


def test_out_in_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="cannot write out="):
        shown(["videos=1024", f"out={tmp_path / 'none' / 'plan.txt'}"], [], capsys)
    with pytest.raises(UserError, match="only output_dir may be a URL"):
        read_keys(["videos=1024", "out=s3://bucket/plan.txt"])


def test_base_lr_follows_base_batch_unless_it_is_set() -> None:
    for extra, lr, told in ([], 0.1, True), (["base.lr=0.07"], 0.07, False):
        own = ["videos=1024", "format=json", "at=[10]", "schedule=baseline", "base.batch=32", *extra]
        result = subprocess.run([sys.executable, PROGRAM, *own], capture_output=True, text=True, check=True)
        assert json.loads(result.stdout)["lr_at_epoch"] == [[10, pytest.approx(lr)]]
        assert ("linear rule" in result.stderr) == told
