"""The table at the end of a sweep."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mgvideo.cli.sweep import SweptRun, print_sweep, sweep_table


def make_run(folder: Path, overrides: list[str], top1: float | None) -> SweptRun:
    """Return a run of `top1` % in 60 seconds of training; None: a run that failed."""
    run_folder = folder / "-".join(overrides)
    run = SweptRun(("dataset=motion", *overrides), run_folder)
    if top1 is not None:
        run_folder.mkdir()
        report = {"metrics": {"top1": top1, "top5": 100.0}, "train_seconds": 60.0}
        (run_folder / "report.json").write_text(json.dumps(report))
    return run


def test_sweep_over_seeds_ends_with_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path, [f"seed={seed}"], top1) for seed, top1 in enumerate((90.0, 92.0, 94.0))]
    print_sweep(runs)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["3", "runs"],
        ["run", "top1,", "%", "training"],
        ["seed=0", "90.00", "60", "s"],
        ["seed=1", "92.00", "60", "s"],
        ["seed=2", "94.00", "60", "s"],
        ["mean", "of", "3", "±", "standard", "deviation", "92.00", "±", "2.00"],
    ]


def test_runs_are_grouped_by_what_differs_besides_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {("short", 0): 80.0, ("short", 1): 82.0, ("long", 0): 90.0, ("long", 1): None}
    print_sweep([make_run(tmp_path, [f"schedule={s}", f"seed={n}"], top1) for (s, n), top1 in values.items()])
    output = capsys.readouterr().out
    assert "schedule=short: mean of 2 ± standard deviation  81.00 ± 1.41" in output
    assert "schedule=long seed=1" in output
    assert "failed" in output
    assert "schedule=long: mean" not in output


def test_no_table_without_reports_or_with_old_ones(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, [f"seed={seed}"], None) for seed in range(2)]
    assert sweep_table(runs) is None
    old = [make_run(tmp_path, [f"lr={lr}"], 50.0) for lr in range(2)]
    for run in old:
        os.utime(run.folder / "report.json", (1, 1))
    assert sweep_table(old) is None
