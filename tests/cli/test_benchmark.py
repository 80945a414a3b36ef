"""`mgvideo benchmark` loader, step and train on small real files: the reports; timings are not checked."""

from __future__ import annotations

import json
from itertools import count, product
from pathlib import Path

import pytest
import torch
from refusals import error_line
from training import KNOBS, TINY
from videos import DECORD, needs_decord

from mgvideo.cli import app
from mgvideo.cli.benchmark import ResultLog, main
from mgvideo.cli.benchmark import augment as benchmark_augment
from mgvideo.cli.benchmark import index as benchmark_index
from mgvideo.cli.benchmark import step as benchmark_step
from mgvideo.cli.benchmark import train as benchmark_train
from mgvideo.cli.benchmark.loader import read_keys, run
from mgvideo.cli.build import build_plan
from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.motion import motion
from mgvideo.datasets.pyramid import PyramidLayout, encode_pyramid
from mgvideo.datasets.timing import DECODE_FUNCTIONS, STAGES, Clock, DecodeOnlyDataset, TimedDataset, TimedDecoder
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.forecast import predict_phase_times, read_benchmark
from mgvideo.plan.plan import Grid

GRID = Grid(4, 24, (1, 3), (28, 40))


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> str:
    folder = str(tmp_path_factory.mktemp("pyramid"))
    names = [str(path.relative_to(motion_root)) for path in Path(motion_root).rglob("train/0000*.mp4")]
    encode_pyramid(folder, motion_root, names, PyramidLayout((20, 40), 40), 1)
    return folder


def test_loader_json_has_a_row_for_each_grid_and_predicts_a_run(tmp_path: Path, motion_root: str, pyramid: str) -> None:
    out = tmp_path / "loader.json"
    overrides = ["seconds=0.05", "rounds=1", "decoders=[pyav]", "format=json", f"out={out}", "step_time=0.5"]
    cfg = app.compose_config("run", [*TINY, f"dataset.root={motion_root}", f"dataset.pyramid={pyramid}"])
    run(read_keys(overrides), cfg)
    report = json.loads(out.read_text())
    grids = {row["grid"] for row in report["rows"]}
    assert len(report["rows"]) == 2 * len(grids), "a row with and one without a pyramid"
    assert {"2x16", "8x32"} <= grids
    assert all(set(row["cpu_milliseconds"]) == set(STAGES) for row in report["rows"])
    base = [row for row in report["rows"] if row["grid"] == "8x32"]
    assert [row["against_base"] for row in base if not row["pyramid"]] == [1]
    assert set(report["whole_plan"]) == {"pyav, original files", "pyav, pyramid"}
    assert report["conditions"]["workers"] == 1
    benchmark = read_benchmark(out)
    assert set(benchmark.clips_per_second) == grids
    fast = {row["grid"]: row["clips_per_second"] for row in report["rows"] if row["pyramid"]}
    assert benchmark.clips_per_second == fast
    assert all(time.loading_s > 0 for time in predict_phase_times(build_plan(cfg, KNOBS.train), 1, benchmark))


@needs_decord
def test_loader_table_of_chosen_grids(motion_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["seconds=0.05", "rounds=1", "decoders=[pyav,decord]", "grids=[8x32]"]
    run(read_keys(overrides), app.compose_config("run", [*TINY, f"dataset.root={motion_root}"]))
    text = capsys.readouterr().out
    assert "pyav, original files" in text
    assert "decord, original files" in text
    assert sum(line.startswith("8x32") for line in text.splitlines()) == 2
    with pytest.raises(UserError, match=r"grids=1x1: the plan has .*8x32"):
        run(read_keys(["grids=[1x1]"]), app.compose_config("run", [*TINY, f"dataset.root={motion_root}"]))


def test_index_report_has_each_recording_with_and_without_index(tmp_path: Path, motion_root: str) -> None:
    cfg = app.compose_config("run", [*TINY, f"dataset.root={motion_root}"])
    out = tmp_path / "index.json"
    lengths = [KNOBS.frames / KNOBS.fps, 5 * KNOBS.frames / KNOBS.fps]
    options = benchmark_index.read_keys([f"lengths={lengths}".replace(" ", ""), "clips=2", "format=json", f"out={out}"])
    benchmark_index.run(options, cfg)
    report = json.loads(out.read_text())
    cases = {(row["length"], row["indexed"], row["cold"]) for row in report["rows"]}
    assert cases == set(product(lengths, (False, True), (False, True)))
    assert all(row["wall_ms"] > 0 for row in report["rows"])
    source = motion(motion_root, KNOBS, "train").path(0)
    with PyAV().open(benchmark_index.repeat_video(source, tmp_path, lengths[1])) as video, PyAV().open(source) as one:
        assert video.frames == 5 * one.frames
        assert video.rate == one.rate
        assert torch.equal(video.read([one.frames + 7]), one.read([7]))
    with pytest.raises(UserError, match=r"lengths=\[0\.0\]: give at least one"):
        benchmark_index.read_keys(["lengths=[0]"])


def test_the_clock_counts_each_stage_once(motion_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr("mgvideo.datasets.timing.time.process_time", lambda: float(next(ticks)))
    clock = Clock(0)
    dataset = motion(motion_root, KNOBS, "train", PyAV())
    plain = dataset[ClipRequest(1, GRID, 1)]
    dataset.decoder = TimedDecoder(PyAV(), clock)
    with clock.measure("collate", without="open"):  # counts the rest, which is almost nothing
        timed = TimedDataset(dataset, clock)[ClipRequest(1, GRID, 1)]
    assert timed.clip.equal(plain.clip)
    spent = dict(zip(STAGES, clock.total().tolist(), strict=True))
    assert min(spent.values()) > 0
    assert sum(spent.values()) == next(ticks) - 1, "all ticks from the first reading to the last"


@pytest.mark.parametrize("name", [DECORD, "pyav"])
def test_decode_only_reads_the_located_file(motion_root: str, name: str) -> None:
    dataset, clock, requests = motion(motion_root, KNOBS, "train", PyAV()), Clock(0), []

    def locate(path: str, short_side: int) -> str:
        requests.append((path, short_side))
        return path

    sample = DecodeOnlyDataset(dataset, DECODE_FUNCTIONS[name], locate, clock)[ClipRequest(3, GRID, 1)]
    assert requests[0][0] == dataset.path(3)
    assert 28 <= requests[0][1] <= 40
    assert sample.index == 3
    assert clock.total()[STAGES.index("decode")] > 0


@pytest.mark.numeric
def test_step_measures_each_grid_under_each_variant(tmp_path: Path) -> None:
    overrides = ["seconds=0.01", "rounds=1", "clips=2", "variants=[fp32/contiguous/off,auto/channels_last/off/2]"]
    cfg = app.compose_config("run", TINY)
    for format in ("table", "json"):
        benchmark_step.run(benchmark_step.read_keys([*overrides, f"format={format}", f"out={tmp_path / format}"]), cfg)
    report = json.loads((tmp_path / "json").read_text())
    plan = build_plan(cfg, 1000 * cfg.base.batch_size)
    grids = {slot.grid.name for phase in plan.phases for slot in phase.slots}
    assert len(report["rows"]) == 2 * len(grids)
    assert all(row["seconds"] > 0 and row["warm_up"] > 0 and row["flops"] > 0 for row in report["rows"])
    shapes = [(row["clips"], *map(int, row["grid"].split("x"))) for row in report["rows"]]
    volumes = [clips * frames * size**2 for clips, frames, size in shapes]
    assert max(volumes) <= 1.1 * min(volumes), "steps of equal volume"
    table = (tmp_path / "table").read_text()
    assert "slowfast" not in table
    assert "fp32/contiguous/off" in table
    assert "steps saved" in table
    assert all(time.compute_s > 0 for time in predict_phase_times(plan, 1, read_benchmark(tmp_path / "json")))


def test_step_leaves_out_emulated_variants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    overrides = ["seconds=0.01", "rounds=1", "clips=1", "grids=[2x16]", "format=json", f"out={tmp_path / 'json'}"]
    variants = "variants=[fp32/contiguous/off,bf16/contiguous/off]"
    cfg = app.compose_config("run", TINY)
    benchmark_step.run(benchmark_step.read_keys([*overrides, variants]), cfg)
    assert [row["variant"] for row in json.loads((tmp_path / "json").read_text())["rows"]] == ["fp32/contiguous/off"]
    assert "left out: bf16/contiguous/off: this CPU does not" in capsys.readouterr().err
    benchmark_step.run(benchmark_step.read_keys([*overrides, variants, "emulated=true"]), cfg)
    assert len(json.loads((tmp_path / "json").read_text())["rows"]) == 2
    with pytest.raises(UserError, match="variants=bf16/contiguous/off: this CPU does not"):
        benchmark_step.run(benchmark_step.read_keys([*overrides, "variants=[bf16/contiguous/off]"]), cfg)


@pytest.mark.slow
def test_train_measures_every_slot_of_both_schedules(tmp_path: Path, motion_root: str) -> None:
    cfg = app.compose_config("run", [*TINY, f"dataset.root={motion_root}"])
    for format in ("table", "json"):
        overrides = ["visits=1", f"format={format}", f"out={tmp_path / format}"]
        benchmark_train.run(benchmark_train.read_keys(overrides), cfg)
    baseline, multigrid = json.loads((tmp_path / "json").read_text())["runs"]
    assert (baseline["schedule"], multigrid["schedule"]) == ("baseline", "multigrid")
    assert baseline["steps"] > multigrid["steps"]
    plan = build_plan(cfg, 1000 * cfg.base.batch_size)
    slots = [(p + 1, slot.grid.name, slot.batch) for p, phase in enumerate(plan.phases) for slot in phase.slots]
    assert [(row["phase"], row["grid"], row["batch"]) for row in multigrid["slots"]] == slots
    assert all(row[kind] > 0 for row in multigrid["slots"] for kind in ("loaded", "held", "bare"))
    assert len(multigrid["boundaries"]) == len(plan.phases) - 1
    assert "saving" in (tmp_path / "table").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["step", "variants=[fp32]"], "variants=fp32"),
        (["step", "variants=[fp32/contiguous/off/0]"], "variants=fp32/contiguous/off/0"),
        (["step", "variants=[]"], "variants=[]"),
        (["step", "grids=[1x1]"], "grids=1x1"),
        (["train", "visits=0"], "visits=0"),
        (["soak", "clips=0"], "clips=0"),
        (["model"], "no benchmark 'model'"),
        (["loader", "decoders=[opencv]"], "decoders=opencv"),
        (["loader", "format=png"], "format=png"),
        (["loader", "seconds=0"], "seconds=0"),
        (["loader", "rounds=0"], "rounds=0"),
        (["loader", "batch=0"], "batch=0"),
    ],
)
def test_invalid_arguments_give_one_error_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in error_line(main, arguments, capsys)


def be_interrupted(out: Path) -> None:
    with ResultLog(2, str(out)) as log:
        log("8x45: 23 ms")
        raise KeyboardInterrupt


def test_results_are_printed_and_kept_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        be_interrupted(out)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "1 of 2, 0 s left: 8x45: 23 ms"
    assert Path(f"{out}.part").read_text() == f"{line}\n"
    with ResultLog(1, str(out)) as log:
        log("8x45: 22 ms")
    assert not Path(f"{out}.part").exists()
    with pytest.raises(UserError, match=r"^cannot write out=.*: No such file"), ResultLog(1, f"{tmp_path}/no/file"):
        pass


def test_augment_json_has_a_step_and_each_option_at_each_grid(tmp_path: Path, motion_root: str) -> None:
    out = tmp_path / "augment.json"
    overrides = ["seconds=0.01", "rounds=1", "clips=2", "options=[none,strong]", "grids=[2x16,8x32]", f"out={out}"]
    cfg = app.compose_config("run", [*TINY, f"dataset.root={motion_root}"])
    benchmark_augment.run(benchmark_augment.read_keys([*overrides, "format=json"]), cfg)
    rows = json.loads(out.read_text())["rows"]
    assert [row["grid"] for row in rows] == ["2x16", "8x32"]
    assert [row["clips"] for row in rows] == [32, 2], "of equal volume"
    for row in rows:
        assert row["augment"]["none"] == 0
        assert row["augment"]["strong"] > 0
        assert row["step"] > 0
    with pytest.raises(UserError, match="options=wild: choose from run, light, none, strong"):
        benchmark_augment.read_keys(["options=[wild]"])
