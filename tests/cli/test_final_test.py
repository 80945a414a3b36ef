"""The test after training, `mgvideo test`, and runs that only test: their files, their report, and what they need."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from refusals import error_line
from training import KNOBS, TINY, run_program

from mgvideo import cli
from mgvideo.datasets.motion import make_motion
from mgvideo.models.small import r2plus1d_small

RUN = [*TINY, "loader.num_workers=0", "precision=fp32", "base.epochs=0.5", "base.lr_milestones=[]", "decoder=pyav"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> tuple[Path, str]:
    """The folder in which a run was started, and what the run printed. Its own folder is `run` inside."""
    folder = tmp_path_factory.mktemp("finished")
    result = run_program(
        *RUN, f"dataset.root={motion_root}", "output_dir=run", "schedule=baseline", cwd=folder, fresh=True
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_report_shows_chance_and_the_files_list_videos_and_classes(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    report = json.loads((folder / "run/report.json").read_text())
    assert re.search(r"test of step (\d+) of \1: top1 \*\*[\d.]+ %\*\* \(chance 16.7 %\)", printed)
    with open(folder / "run/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    hits = sum(row["label"] == row["class_1"] for row in rows)
    assert len(rows) == KNOBS.val
    assert 100 * hits / len(rows) == pytest.approx(report["metrics"]["top1"])
    with open(folder / "run/per_class.csv", newline="") as file:
        classes = list(csv.DictReader(file))
    counts = [int(row["videos"]) for row in classes]
    assert sum(counts) == KNOBS.val
    assert report["chance"] == pytest.approx(100 * max(counts) / KNOBS.val)
    assert (folder / "run/confusion.png").stat().st_size > 1000


def test_commands_to_try_next_keep_the_overrides_of_the_run_and_work(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    commands = re.findall(r"^- `([^`]+)`: ", printed.split("Try next")[1], re.MULTILINE)
    assert len(commands) == 2
    assert {"schedule=multigrid", "model.width=4"} <= set(commands[0].split())
    assert not {"schedule=baseline", "output_dir=run"} & set(commands[0].split())
    for command, more in ((commands[0], "--cfg job"), (commands[1], "clips=1")):
        done = subprocess.run(
            f"{command} {more}",
            shell=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_weights_of_a_run_are_tested_without_its_training_videos(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["test", f"weights={finished[0]}/run", "loader.num_workers=0", "out=results"])
    assert f"test of {finished[0]}/run/checkpoints/best.pt: " in capsys.readouterr().out
    again = json.loads((tmp_path / "results/report.json").read_text())
    assert again["steps"] is None
    assert again["videos"] == KNOBS.val


def test_a_run_that_only_tests_needs_only_the_list_of_the_test(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    videos = Path(make_motion(motion_root, KNOBS))
    (tmp_path / "val.csv").write_text(
        "".join(f"{videos}/{line}\n" for line in (videos / "val.csv").read_text().splitlines())
    )
    torch.save(r2plus1d_small(8, width=4).state_dict(), tmp_path / "w.pt")
    words = [word for word in RUN if "knobs" not in word]
    words += ["dataset=kinetics400", f"dataset.root={tmp_path}", "dataset.num_classes=8", "init_from=w.pt"]
    cli.main(["run", *words, "train.enable=false", "base.batch_size=4096", "output_dir=out"])
    assert "test of w.pt: top1" in capsys.readouterr().out
    assert not (tmp_path / "out/plan.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "weights is not set: add weights=PATH to the command"),
        (["weights=nowhere"], "weights=nowhere: no such file or folder"),
        (["weights=w.pt"], "weights=w.pt is not in a run's folder: add its network to the command, model=…"),
    ],
)
def test_bad_weights_are_refused_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(r2plus1d_small(8, width=4).state_dict(), tmp_path / "w.pt")
    assert message in error_line(lambda arguments: cli.main(["test", *arguments]), words, capsys)
