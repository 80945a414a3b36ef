"""`dataset=folder` by its documented commands: fifty short clips of three classes give a useful network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from training import ROOT, run_program

from mgvideo import cli

PAGE = ROOT / "docs/datasets/folder.md"


def commands_of_the_example() -> list[str]:
    """Return the commands under the heading "An example" of the page."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## An example\n")[2].partition("\n## ")[0]
    return [line for block in re.findall(r"^```\n(.*?)^```", section, re.M | re.S) for line in block.splitlines()]


@pytest.mark.slow
def test_fifty_clips_give_a_useful_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare, train = commands_of_the_example()
    words = re.findall(r"'[^']*'|\S+", prepare.removeprefix("python tools/prepare_data.py "))
    cli.main(["prepare", *(word.strip("'") for word in words)])
    assert len(list((tmp_path / "my_videos").glob("train/*/*.mp4"))) == 48
    result = run_program(*train.removeprefix("python tools/run_net.py ").split(), "output_dir=out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "note: recipe for 48 videos and random weights: base.batch_size=8" in result.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["videos"] == 150
    assert report["metrics"]["top1"] >= 80
