"""`mgvideo reproduce`: every table composes, and small real runs of one table result in a report."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from refusals import error_line
from training import TINY

from mgvideo.cli import jobs, reproduce
from mgvideo.cli.reproduce import main
from mgvideo.cli.tables import TableEntry, compose_entries, load_table, presets_by_table
from mgvideo.cli.values import override_key
from mgvideo.errors import UserError
from mgvideo.reproduce.tables import read_table
from mgvideo.storage.checkpoints import lock_run_folder

PRESETS = ("motion", "motion112", "camera", "kinetics", "charades", "ssv2")
# all published figures that tables may quote; sources are in models/README.md
PUBLISHED = {
    "kinetics": {(76.8, 92.7), (76.6, 92.7), (76.58, 92.85), (76.07, 92.21), ()},
    "charades": {(38.9,), (38.6,)},
    "ssv2": {(63.0, 88.5), (63.5, 88.7)},
    "motion": set(),
    "motion112": set(),
    "camera": set(),
}
FAST = ["train.precise_bn_clips=0", "loader.num_workers=0", "test.num_crops=1"]
ON_SLURM = ["table=schedules", "processes=8", "launcher=slurm"]
TINY_CELLS = [word for word in (*TINY, *FAST) if not word.startswith("base.lr=")]  # which the cells of `schedules` set
SHORT = [*TINY_CELLS, "base.epochs=0.5", "base.lr_milestones=[]", "seeds=[0,1]"]


def of_preset(preset: str) -> dict[str, list[TableEntry]]:
    return {
        name: compose_entries(load_table(name, preset), [], None)
        for name, presets in presets_by_table().items()
        if preset in presets
    }


def test_overrides_of_rows_then_columns_come_before_those_of_a_cell() -> None:
    cells = [
        {"name": "a", "row": "A", "column": "C", "overrides": ["base.lr=1"]},
        {"name": "b", "overrides": ["seed=2"]},
    ]
    data = {"title": "t", "mirrors": "m", "baseline": "a", "figure": "none", "cells": cells}
    data["presets"] = {"motion": {"rows": {"A": ["model=i3d_small"]}, "columns": {"C": ["schedule=long"]}}}
    table = read_table("test", data, load_table("schedules", "motion").preset)
    assert [cell.overrides for cell in table.cells] == [("model=i3d_small", "schedule=long", "base.lr=1"), ("seed=2",)]


@pytest.mark.parametrize("preset", PRESETS)
def test_cells_of_one_name_have_the_same_overrides_in_all_tables(preset: str) -> None:
    overrides: dict[str, dict[str, str]] = {}
    for name, cells in of_preset(preset).items():
        for entry in cells:
            values = {override_key(override): override for override in entry.overrides}  # the last one of a key counts
            assert overrides.setdefault(entry.cell.name, values) == values, name


@pytest.mark.parametrize(
    ("table", "preset"),
    [  # `beyond` and `beyond_tuning` have many cells of the same form
        pytest.param(name, preset, marks=pytest.mark.slow if name.startswith("beyond") else ())
        for name, presets in presets_by_table().items()
        for preset in presets
    ],
)
def test_every_cell_composes_and_plans(table: str, preset: str) -> None:
    has_schedules = table != "schedules" and preset in presets_by_table()["schedules"]
    for entry in compose_entries(load_table(table, preset), [], None):
        shared = entry.cell.name in ("baseline", "multigrid") and has_schedules  # which composes these
        same = preset in ("charades", "ssv2") and table in ("tradeoff", "ablations")  # cells are those of kinetics
        if not (entry.cell.not_run or shared or same):
            assert entry.plan.steps > 100
            assert entry.config.schedule.name == entry.plan.schedule


def test_shared_overrides_scale_the_recipe_as_in_a_run() -> None:
    (entry, *_) = compose_entries(load_table("schedules", "kinetics"), ["base.epochs=10", "dataset.root=data"], None)
    assert entry.recipe()["base.lr_milestones"] == pytest.approx([940 / 239, 1540 / 239, 1960 / 239])
    assert not [
        key for key in entry.recipe() if "train_videos" in key
    ]  # `train_videos` only serves planning without the dataset


@pytest.mark.parametrize("preset", PRESETS)
def test_only_published_figures_are_quoted(preset: str) -> None:
    cells = [entry.cell for each in of_preset(preset).values() for entry in each]
    quoted = {tuple(cell.published.metrics.values()) for cell in cells if cell.published}
    assert quoted == PUBLISHED[preset]


def test_released_weights_are_used_if_present(tmp_path: Path) -> None:
    file = tmp_path / "it's here" / "Kinetics" / "SLOWFAST_8x8_R50_stepwise.pkl"
    file.parent.mkdir(parents=True)
    file.touch()
    entries = {
        e.cell.name: e for e in compose_entries(load_table("published", "kinetics"), [], str(tmp_path / "it's here"))
    }
    assert entries["released_standard"].config.init_from == str(file)
    reason = entries["released_multigrid"].skip_reason
    assert reason
    assert "Kinetics/SLOWFAST_8x8_R50_stepwise_multigrid.pkl from https://" in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cels": []}, "cels is no key"),
        ({"figure": "pie"}, "figure=pie"),
        ({"cells": [{"name": "a"}, {"name": "a"}]}, "same name"),
        ({"cells": [{"overrides": []}]}, "'name'"),
        ({"cells": [{"name": "a", "weights_of": "b"}]}, "no cell b"),
        ({"presets": {"motion": {"publishd": {}}}}, "publishd"),
        ({"presets": {"motion": {"rows": {"SlowFst": []}}}}, "rows: there is no cell of row SlowFst"),
        ({"presets": {"motion": {"rows": {"": "seed=1"}}}}, "rows: : expected a list of overrides"),
        ({"presets": {"motion": {"columns": {"lnog": []}}}}, "columns: there is no cell of column lnog"),
        ({"presets": {"kinetics": {}}}, "choose one of kinetics"),
    ],
)
def test_an_invalid_table_gives_a_one_line_error(change: dict, message: str) -> None:
    right = {"title": "t", "mirrors": "m", "baseline": "a", "figure": "none"}
    right |= {"cells": [{"name": "a"}], "presets": {"motion": {}}}
    preset = load_table("schedules", "motion").preset
    assert read_table("test", right, preset).cells[0].name == "a"
    with pytest.raises(UserError, match=message) as caught:
        read_table("test", right | change, preset)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table=schedule"], "table=schedule does not exist; choose one of ablations"),
        (["table=published"], "no preset=motion: choose one of kinetics"),
        (["table=schedules", "base.batchh=3"], "did you mean base.batch_size?"),
        (["table=schedules", "schedule=long"], "every cell of table schedules sets schedule itself"),
        (["table=schedules", "seed=3"], "give seeds=[…] instead"),
        (["--list", "rows=[SlowFast]"], "cells and rows are those of one table: add table=…"),
        (["table=schedules", "cells=[baselin]"], "has no baselin; choose from baseline"),
        (["table=beyond", "rows=[SlowFats]"], "has no SlowFats; choose from SlowFast, MViTv2"),
        (["table=beyond", "rows=[MViTv2]", "cells=[baseline]"], "rows have no cell of table beyond in common"),
        (["table=schedules", "preset=kinetics"], "dataset.root is not set"),
        (["table=generality", "launcher=joblib"], "two_workers_baseline takes 2 processes, launcher=joblib starts one"),
        ([*ON_SLURM, "hydra.launcher.nodes=3"], "nodes=3: 8 processes of cell baseline cannot be spread evenly"),
        ([*ON_SLURM, "hydra.launcher.nodes=two"], "hydra.launcher.nodes=two: give a whole number"),
        ([*ON_SLURM, "hydra.launcher.tasks_per_node=4"], "tasks_per_node: give processes=…"),
        (["table=schedules", "preset=charades"], "needs kinetics400/SLOWFAST_8x8_R50.pkl from https://"),
    ],
)
def test_invalid_arguments_are_refused_before_any_run_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(main, [*arguments, f"out={tmp_path}"], capsys)
    assert line.startswith("error: ")
    assert message in line


def test_slurm_starts_one_task_and_gpu_per_process_of_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start_process(command: list[str], folder: Path) -> subprocess.Popen:
        started.append(" ".join(command))
        process = subprocess.Popen(["false"])
        process.wait()
        return process

    monkeypatch.setattr(reproduce, "start_process", start_process)
    cells = ["table=generality", "cells=[i3d_baseline,two_workers_baseline]", "processes=8", f"out={tmp_path}"]
    for given, sizes in (
        ([], [(1, 8, 8), (1, 2, 2)]),
        (["hydra.launcher.nodes=2"], [(2, 4, 4), (2, 1, 1)]),
        (["hydra.launcher.nodes=4", "hydra.launcher.gpus_per_node=0"], [(4, 2, 0), (2, 1, 0)]),
    ):
        with pytest.raises(SystemExit):
            main([*cells, "launcher=slurm", *given])
        for command, numbers in zip(started, sizes, strict=True):
            named = zip(("nodes", "tasks_per_node", "gpus_per_node"), numbers, strict=True)
            for key, number in named:
                assert re.findall(rf"hydra\.launcher\.{key}=(\S+)", command) == [str(number)]
        started.clear()


def test_list_needs_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    benchmark = tmp_path / "benchmark.json"
    grids = {f"{frames}x{size}": 0.5 for frames in (4, 8, 16) for size in (32, 45, 64)}
    benchmark.write_text(json.dumps({"step_seconds": grids}))
    recipe = [
        "base.epochs=20",
        "base.lr_milestones=[12,18]",
        "base.batch_size=16",
        "base.num_frames=16",
        "base.crop_size=64",
    ]
    main(["--list", "table=schedules", f"benchmark={benchmark}", *recipe])
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "baseline" in line)
    assert re.search(r"20 +1,280 +.* 1\.00× +10:40 min", row), "1,280 steps of half a second in one process"
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.json"]


def test_cells_may_share_a_key_that_names_their_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grids = {f"{frames}x{size}": 0.5 for frames in (4, 8, 16) for size in (32, 45, 64)}
    (tmp_path / "slowfast_small.json").write_text(json.dumps({"step_seconds": grids}))
    benchmark = f"schedule.benchmark={tmp_path}/${{model_option}}.json"
    main(["--list", "table=beyond", "rows=[SlowFast]", benchmark])  # there is no file for other networks
    shown = capsys.readouterr().out
    assert "cooldown_budget0.33" in shown
    assert "MViTv2" not in shown
    entry = next(e for e in compose_entries(load_table("beyond", "motion"), [benchmark], None) if "long" in e.cell.name)
    assert entry.recipe()["schedule.benchmark"] == f"{tmp_path}/slowfast_small.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> tuple[Path, list[str]]:
    """The folder and command of two finished runs of one cell, run through a Hydra launcher."""
    folder = tmp_path_factory.mktemp("tables, here")
    command = [*SHORT, "table=schedules", f"dataset.root={motion_root}"]
    main([*command, "cells=[multigrid]", "launcher=basic", f"out={folder}"])
    return folder, command


def test_a_report_contains_the_results_of_the_runs(finished: tuple[Path, list[str]]) -> None:
    folder, _ = finished
    runs = [json.loads((folder / f"runs/multigrid_seed{seed}/report.json").read_text()) for seed in (0, 1)]
    with open(folder / "schedules/report.csv", newline="") as file:
        lines = {line["cell"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["multigrid"], "no other cell was chosen"
    mean = sum(run["metrics"]["top1"] for run in runs) / 2
    assert float(lines["multigrid"]["top1_mean"]) == pytest.approx(mean, abs=1e-3)
    assert int(lines["multigrid"]["steps"]) == runs[0]["steps"]
    report = (folder / "schedules/report.md").read_text()
    assert f"{mean:.2f} ± " in report
    assert runs[0]["hardware"] in report
    html = (folder / "schedules/report.html").read_text()
    assert html.count("<svg") == 2
    assert not re.search(r'(src|href)="(?!#)', html), "the page has no external files"
    for name in ("accuracy_over_time", "learning"):
        assert (folder / f"schedules/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"schedules/{name}.svg").exists()


@pytest.mark.parametrize(
    ("count", "cpus"),
    [(1, [{0, 1, 2, 5}]), (2, [{0, 1}, {2, 5}]), (3, [{0}, {1}, {2, 5}]), (6, [{0}, {1}, {2}, {5}, {0}, {1}])],
)
def test_jobs_at_once_divide_the_cores(count: int, cpus: list[set[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "available_cpus", lambda: frozenset({0, 1, 2, 5}))
    assert jobs.split_cpus(count) == cpus


def test_jobs_run_at_once_and_a_dependent_one_after_what_it_depends_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are replaced by processes that record when they start and end, and leave what a finished run leaves."""
    record = (
        "import json, os, sys, time; folder = sys.argv[1]; start = time.time(); time.sleep(0.7);"
        "report = dict(metrics=dict(top1=50.0), train_seconds=0, hardware='h', precision='p', torch='t',"
        "date='2026-01-01', videos=1, views='1', bad_videos=0);"
        "json.dump(report, open(f'{folder}/report.json', 'w')); open(f'{folder}/metrics.jsonl', 'w');"
        "os.makedirs(f'{folder}/checkpoints'); open(f'{folder}/checkpoints/step_00000001.pt', 'w');"
        "json.dump([start, time.time(), len(os.sched_getaffinity(0))], open(f'{folder}/times', 'w'))"
    )
    monkeypatch.setattr(
        jobs.Job, "command", lambda job: [sys.executable, "-c", record, str(job.folder), *job.initial_weights()]
    )
    cells = "cells=[baseline,multigrid,two_labels_tuned_baseline]"
    main(["table=generality", cells, "jobs=2", f"out={tmp_path}"])
    printed = capsys.readouterr().out
    assert [f"[{n}/3]" in printed for n in (1, 2, 3)] == [True] * 3
    names = ("baseline", "multigrid", "two_labels_tuned_baseline")
    times = [json.loads((tmp_path / f"runs/{name}_seed0/times").read_text()) for name in names]
    assert times[1][0] < times[0][1], "the first two run at the same time"
    assert times[2][0] >= times[0][1], "the third starts from the weights of the first"
    assert times[0][2] == max(1, len(os.sched_getaffinity(0)) // 2)
    report = (tmp_path / "generality/report.md").read_text()
    assert "up to 2 runs shared the machine: each took longer than it would alone" in report
    assert json.loads((tmp_path / "runs/baseline_seed0/cell.json").read_text())["jobs_at_once"] == 2


def run_with_locked_folder(finished: tuple[Path, list[str]], out: Path) -> list[str]:
    """Copy the finished runs to `out` and run the baseline there while the folder of seed 0 is locked.

    Returns the command.
    """
    folder, command = finished
    shutil.copytree(folder, out)
    locked = out / "runs/baseline_seed0"
    locked.mkdir()
    with lock_run_folder(locked), pytest.raises(SystemExit) as stop:
        main([*command, "cells=[baseline,multigrid]", f"out={out}"])
    assert stop.value.code == 1
    return command


@pytest.mark.slow
def test_finished_runs_are_skipped_and_others_run_after_a_failure(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_with_locked_folder(finished, out)
    shown = capsys.readouterr()
    assert "4 runs, 2 done before" in shown.out
    assert "error: baseline_seed0 failed: output_dir=" in shown.err
    assert "baseline_seed1 done" in shown.out
    report = (out / "schedules/report.md").read_text()
    assert "baseline: baseline_seed0 failed: output_dir=" in report
    runs = [
        json.loads((out / f"runs/{name}/report.json").read_text()) for name in ("baseline_seed1", "multigrid_seed0")
    ]
    line = next(line for line in report.splitlines() if line.startswith("| long + short"))
    assert f"| {runs[0]['steps'] / runs[1]['steps']:.2f}× |" in line
    assert "| 1.00× | 1.00× | 1.00× |" in report, "the baseline relative to itself: steps, FLOPs, time"


@pytest.mark.slow
def test_cells_with_initial_weights_or_two_workers_and_repeated_tests(
    finished: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = run_with_locked_folder(finished, out)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, "table=generality", "cells=[two_labels_tuned_baseline]", f"out={out}"])
    shown = capsys.readouterr()
    assert (
        "error: two_labels_tuned_baseline_seed0 failed: it starts from the weights of baseline_seed0, which"
        in shown.err
    )
    assert "two_labels_tuned_baseline_seed1 done" in shown.out
    newest = max((out / "runs/baseline_seed1/checkpoints").glob("step_*.pt"))
    assert f"init_from: {newest}" in (out / "runs/two_labels_tuned_baseline_seed1/config.yaml").read_text()

    main([*command, "table=generality", "cells=[two_workers_baseline]", "seeds=[1]", f"out={out}"])
    report = json.loads((out / "runs/two_workers_baseline_seed1/report.json").read_text())
    assert report["hardware"].endswith("2 ranks")

    first = json.loads((out / "runs/baseline_seed1/report.json").read_text())
    capsys.readouterr()
    main([*command, "cells=[baseline]", "seeds=[1]", f"out={out}", "test.num_clips=2"])
    assert "1 runs, 0 done before" in capsys.readouterr().out
    again = json.loads((out / "runs/baseline_seed1/report.json").read_text())
    assert (again["views"], first["views"]) == ("2×1", "1×1")
    assert again["train_seconds"] == first["train_seconds"], "the run was only tested again"


def test_a_folder_of_another_recipe_is_refused_and_the_key_named(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*finished[1], "cells=[multigrid]", f"out={finished[0]}", "base.gamma=0.2"])
    assert stop.value.code == 2
    assert "holds a run of another recipe: base.gamma was 0.1, is 0.2" in capsys.readouterr().err
    assert (finished[0] / "runs/multigrid_seed0/report.json").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_no_process_and_the_same_command_resumes(
    tmp_path: Path, motion_root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/baseline_seed0"

    def interrupt() -> None:
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    arguments = [*TINY_CELLS, "base.epochs=20", "table=schedules", "cells=[baseline]", f"out={tmp_path}"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, f"dataset.root={motion_root}"])
    assert stop.value.code == 130
    assert "stopped by SIGINT; run the same command to resume" in capsys.readouterr().out
    checkpoint = max((folder / "checkpoints").glob("step_*.pt"))
    assert (tmp_path / "schedules/report.html").exists()
    assert "1 of 1 runs not finished yet" in (tmp_path / "schedules/report.csv").read_text()
    child = int((folder / ".lock").read_text().split()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)

    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        main([*arguments, f"dataset.root={motion_root}"])
    finally:
        os.sched_setaffinity(0, cores)
    assert "1 runs, 0 done before" in capsys.readouterr().out
    assert f"resumed at step {int(checkpoint.stem[5:])} of 160" in (folder / "run.log").read_text()
    hardware = json.loads((folder / "report.json").read_text())["hardware"]
    assert "1 CPU core (" in hardware
    assert hardware.count("CPU core") == min(len(cores), 2), "the report lists the cores before and after resuming"
