"""`mgvideo benchmark scale`: its rows on a small list; their values are not checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import error_line
from training import TINY

from mgvideo.cli import app
from mgvideo.cli.benchmark import main
from mgvideo.cli.benchmark.scale import read_keys, run


@pytest.mark.slow
def test_rows_of_start_up_memory_and_latency(tmp_path: Path) -> None:
    own = ["entries=1200", "files=8", "ranks=4", "workers=2", "steps=2", "format=json", f"out={tmp_path / 'out'}"]
    run(read_keys([*own, f"folder={tmp_path / 'files'}"]), app.compose_config("run", [*TINY, "schedule=baseline"]))
    rows = {row["name"]: row for row in json.loads((tmp_path / "out").read_text())["rows"]}
    assert len(rows) == 13
    assert list((tmp_path / "files/large/.mgvideo").iterdir()), "the listing that other ranks read"
    assert all(row["value"] > 0 for name, row in rows.items() if row["unit"] in ("s", "ms"))


@pytest.mark.parametrize("argument", ["entries=10", "files=0", "ranks=0", "workers=0", "steps=1", "format=png"])
def test_invalid_arguments_give_one_error_line(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert argument in error_line(main, ["scale", argument, *TINY], capsys)
