"""`mgvideo benchmark sampler`: the rows of its report; timings are not checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import error_line
from training import TINY

from mgvideo.cli import app
from mgvideo.cli.benchmark import main
from mgvideo.cli.benchmark.sampler import read_keys, run


def test_rows_for_each_number_of_ranks_at_equal_batch_and_at_equal_clips_per_rank(tmp_path: Path) -> None:
    cfg = app.compose_config("run", TINY)
    for format in ("table", "json"):
        own = ["ranks=[2,8]", "batch=128", "clips=64", "videos=2000", "steps=2", f"format={format}"]
        run(read_keys([*own, f"out={tmp_path / format}"]), cfg)
    rows = json.loads((tmp_path / "json").read_text())["rows"]
    assert [(row["ranks"], row["base_batch"]) for row in rows] == [(2, 128), (8, 128), (2, 8), (8, 32)]
    assert [row["clips"] for row in rows] == [1024, 256, 64, 64]
    assert all(row["batch"] == row["ranks"] * row["clips"] and row["cpu_ms"] > 0 for row in rows)
    assert "2,048" in (tmp_path / "table").read_text()


@pytest.mark.parametrize("argument", ["ranks=[]", "ranks=[0]", "batch=0", "steps=0", "videos=0", "format=png"])
def test_invalid_arguments_give_one_error_line(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert argument in error_line(main, ["sampler", argument, *TINY], capsys)
