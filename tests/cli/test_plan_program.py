"""`mgvideo plan` without videos and weights."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hydra.utils import instantiate
from refusals import error_line

from mgvideo.cli import app
from mgvideo.cli import plan as plan_program
from mgvideo.cli.build import build_plan
from mgvideo.cli.help import group_options
from mgvideo.cli.plan import clip_flops, main, read_keys, show, train_videos
from mgvideo.errors import UserError
from mgvideo.plan.plan import Grid

PROGRAM = Path(__file__).parents[2] / "tools/plan.py"


def run_show(own_overrides: list[str], overrides: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    show(read_keys(own_overrides), app.compose_config("run", overrides))
    return capsys.readouterr().out


def test_program() -> None:
    arguments = ("videos=1024", "gpus=2", "schedule=short", "step_time=0.1")
    result = subprocess.run([sys.executable, PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Plan: short, 1,024 clips on 2 GPUs" in result.stdout
    assert "fewer FLOPs" in result.stdout
    assert "Required loader throughput" in result.stdout


def test_an_invalid_value_gives_one_error_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_line(main, ["gpus=zero"], capsys).startswith("error: gpus")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    own_overrides = ["videos=1024", "format=json", "at=[0,14.9]", "step_time=0.1", "gpus=2"]
    result = json.loads(run_show(own_overrides, ["schedule=multigrid"], capsys))
    assert result["max_epoch"] == 30
    assert [epoch for epoch, _ in result["lr_at_epoch"]] == [0, 14.9]
    assert sum(phase["steps"] for phase in result["phases"]) == result["steps"]
    assert sum(phase["cost_share"] for phase in result["phases"]) == pytest.approx(1)
    assert result["seconds"] == pytest.approx(0.1 * result["steps"])
    assert result["saving"]["flops"] > 2


def test_times_are_predicted_from_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = tmp_path / "benchmark.json"
    benchmark.write_text(json.dumps({"step_seconds": {"16x64": 1.0}, "clips_per_second": {"16x64": 4.0}, "workers": 2}))
    text = run_show(["videos=160", "gpus=1", f"benchmark={benchmark}"], ["schedule=baseline"], capsys)
    assert "predicted training time: 13:20 min" in text  # 200 steps of 16 clips at 4 clips a second
    assert "waits 75% of its time for data: use 4.0× as many workers per GPU (8 instead of 2)" in text


def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_show(["videos=1024", "format=png", f"out={tmp_path / 'plan.png'}"], [], capsys)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_flops_agree_with_fvcore() -> None:
    """fvcore also counts pooling and normalisation layers, hence the tolerance."""
    cfg = app.compose_config("run", [])
    model = instantiate(cfg.model).eval()
    expected = FlopCountAnalysis(model, torch.zeros(1, 3, 8, 45, 45)).unsupported_ops_warnings(False).total()
    assert clip_flops(cfg)(Grid(8, 45, (1, 1), (45, 45))) == pytest.approx(expected, rel=0.03)


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
def test_invalid_keys_raise(arguments: list[str], key: str) -> None:
    with pytest.raises(UserError, match=key):
        read_keys(arguments)


PUBLISHED = {
    "kinetics400": 240_436, "kinetics600": 383_393, "kinetics700": 542_357, "charades": 7_985, "ssv2": 168_913,
    "ucf101": 9_537, "hmdb51": 3_570,
}  # fmt: skip


@pytest.mark.parametrize("name", group_options()["dataset"])
def test_a_published_dataset_is_planned_without_its_files(name: str) -> None:
    cfg = app.compose_config("run", [f"dataset={name}"])
    if name in ("motion", "camera"):  # generated on first use, with the number of videos in its config
        assert train_videos(cfg) == (cfg.dataset.knobs.train, ())
    elif name in ("folder", "shards"):
        with pytest.raises(UserError, match=r"^dataset\.root is not set: add dataset\.root=… to the command$"):
            train_videos(cfg)
    else:
        count, (note,) = train_videos(cfg)
        assert count == PUBLISHED[name]
        assert note == f"planned for the published {count:,} training videos, as dataset.root is not set"
        assert build_plan(cfg, count).dataset_size == count


def test_the_published_number_depends_on_the_fold(capsys: pytest.CaptureFixture[str]) -> None:
    counts = [train_videos(app.compose_config("run", ["dataset=ucf101", f"dataset.fold={n}"]))[0] for n in (1, 2, 3)]
    assert counts == [9537, 9586, 9624]
    with pytest.raises(UserError, match=r"dataset\.root is not set"):
        train_videos(app.compose_config("run", ["dataset=ucf101", "dataset.fold=4"]))


def test_a_note_marks_the_published_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, note = ["dataset=hmdb51"], "planned for the published 3,570 training videos"
    text = run_show(["gpus=1"], overrides, capsys)
    assert "3,570 clips" in text
    assert f"note: {note}" in text
    assert note in json.loads(run_show(["gpus=1", "format=json"], overrides, capsys))["notes"][-1]
    assert f"note: {note}" in run_show(["gpus=1", "format=png", f"out={tmp_path / 'plan.png'}"], overrides, capsys)
    assert note not in run_show(["gpus=1", "videos=3570"], overrides, capsys)


def test_an_existing_dataset_is_counted_and_a_wrong_root_raises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").write_text("".join(f"{n}.mp4 0\n" for n in range(70)))
    overrides = ["dataset=kinetics400", f"dataset.root={tmp_path}"]
    text = run_show(["gpus=1"], overrides, capsys)
    assert "70 clips" in text
    assert "published" not in text
    for wrong in (tmp_path / "none", tmp_path / "train.csv"):
        with pytest.raises(
            UserError, match=r"dataset\.root: no folder .*; or add videos=N to plan without the dataset"
        ):
            run_show([], ["dataset=kinetics400", f"dataset.root={wrong}"], capsys)
    with pytest.raises(UserError, match=r"Charades_v1_train\.csv: cannot be read.*videos=N"):
        run_show([], ["dataset=charades", f"dataset.root={tmp_path}"], capsys)


def test_an_unknown_number_of_videos_raises_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"dataset\.root is not set.*; or add videos=N to plan without the dataset"):
        run_show([], ["dataset=folder"], capsys)
    with pytest.raises(UserError, match=r"dataset\.train_videos=many: give a whole number from 1 up"):
        run_show([], ["dataset=ssv2", "dataset.train_videos=many"], capsys)


@pytest.mark.parametrize(
    ("available", "planned", "note"),
    [
        (0, 8, "planned for 8 GPUs, as this machine has none; gpus=N sets the number"),
        (1, 1, "planned for the 1 GPU of this machine; gpus=N sets the number"),
        (2, 2, "planned for the 2 GPUs of this machine; gpus=N sets the number"),
    ],
)
def test_the_default_number_of_gpus_is_that_of_the_machine(
    available: int, planned: int, note: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: available)
    result = json.loads(run_show(["videos=1024", "format=json"], [], capsys))
    assert (result["gpus"], result["notes"][-1]) == (planned, note)
    result = json.loads(run_show(["videos=1024", "format=json", "gpus=4"], [], capsys))
    assert result["gpus"] == 4
    assert not [line for line in result["notes"] if "GPU" in line]


def test_a_default_number_of_gpus_that_no_run_can_use_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(UserError, match=r"^3 ranks cannot share .*; or add gpus=N to plan for another number$"):
        run_show(["videos=1024"], [], capsys)
    with pytest.raises(UserError, match=r"^3 ranks cannot share .* change base\.batch_size$"):
        run_show(["videos=1024", "gpus=3"], [], capsys)


def test_out_in_a_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="cannot write out="):
        run_show(["videos=1024", f"out={tmp_path / 'none' / 'plan.txt'}"], [], capsys)
    with pytest.raises(UserError, match="only output_dir may be a URL"):
        read_keys(["videos=1024", "out=s3://bucket/plan.txt"])


def test_out_is_blamed_for_its_own_errors_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(plan_program, "write", fail)
    error: OSError = BrokenPipeError(errno.EPIPE, "Broken pipe")  # of `plan | head`: no message
    with pytest.raises(BrokenPipeError):
        run_show(["videos=1024"], [], capsys)
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/fonts/a.ttf")
    with pytest.raises(UserError, match=r"^/fonts/a\.ttf: No such file"):
        run_show(["videos=1024", f"out={tmp_path / 'plan.txt'}"], [], capsys)


@pytest.mark.parametrize(
    ("overrides", "lr", "ends", "starts"),
    [
        (["base.batch_size=32"], 0.1, [12, 18, 20], ["base.lr: 0.05 at the recipe's batch of 16 becomes 0.1"]),
        (
            ["base.batch_size=64", "recipe.lr_scaling=sqrt"], 0.1, [12, 18, 20],
            ["base.lr: 0.05 at the recipe's batch of 16 becomes 0.1", "warning: base.lr=0.1 of the recipe is for SGD"],
        ),
        (["base.batch_size=32", "recipe.lr_scaling=none"], 0.05, [12, 18, 20], []),
        (["optimizer=adamw"], 0.05, [12, 18, 20], ["warning: base.lr=0.05 of the recipe is for SGD"]),
        (["optimizer=lamb", "base.lr=0.002"], 0.002, [12, 18, 20], []),
        (["base.batch_size=32", "base.lr=0.07"], 0.07, [12, 18, 20], []),
        (
            ["base.epochs=30"], 0.05, [18, 27, 30],
            [
                "base.lr_milestones: [12, 18] of the recipe's 20 epochs becomes [18, 27] at base.epochs=30, and "
                "base.warmup_epochs 3 becomes 4.5 (set either to choose both)"
            ],
        ),
        (["base.epochs=30", "base.batch_size=8"], 0.025, [18, 27, 30], ["base.lr: 0.05 at", "base.lr_milestones: [12"]),
        (["base.epochs=20"], 0.05, [12, 18, 20], []),
        (["base.epochs=30", "base.lr_milestones=[25]"], 0.05, [25, 30], []),
        (["base.epochs=30", "base.warmup_epochs=9"], 0.05, [12, 18, 30], []),
    ],
)  # fmt: skip
def test_the_recipe_scales_with_batch_size_and_epochs(
    overrides: list[str], lr: float, ends: list[float], starts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["gpus=1", "videos=1024", "format=json", "at=[10]", "schedule=baseline", *overrides])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["lr_at_epoch"] == [[10, pytest.approx(lr)]]
    assert [phase["epoch_end"] for phase in result["phases"]] == ends
    lines = printed.err.splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        (["schedule=multigrid", "base.batch_size=4096"], "102 (12.8, times 8 for the coarsest clips)"),
        (["schedule=baseline", "base.batch_size=4096"], "12.8,"),
        (["schedule=baseline", "base.batch_size=1024"], ""),
        (["schedule=multigrid", "base.batch_size=64"], ""),
        (["schedule=multigrid", "base.batch_size=4096", "base.lr=0.4"], ""),
    ],
)
def test_an_lr_above_any_published_one_is_warned_about(
    overrides: list[str], lr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["gpus=1", "videos=10000", "format=json", *overrides])
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(lr)
    assert all(f"base.batch_size=4096 raises the LR to {lr}" in warning for warning in warnings)


@pytest.fixture
def schedule_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the checkout with a function that is a schedule, and YAML files for it."""
    (tmp_path / "schedule").mkdir()
    (tmp_path / "own_schedules.py").write_text(
        "from mgvideo.plan.drafts import PhaseDraft, make_plan, make_slots\n"
        "def one_phase(base, dataset_size, end: float):\n"
        "    return make_plan('one_phase', base, dataset_size, [PhaseDraft(0, make_slots(base), 1, end)])\n"
        "def no_plan(base, dataset_size):\n"
        "    return []\n"
    )
    for name, keys in {
        "one_phase": "_target_: own_schedules.one_phase\n_partial_: true\nend: 5",
        "misspelt": "_target_: own_schedules.one_phase\n_partial_: true\nend: 5\nends: 5",
        "incomplete": "_target_: own_schedules.one_phase\n_partial_: true",
        "not_partial": "_target_: own_schedules.one_phase\nend: 5",
        "no_plan": "_target_: own_schedules.no_plan\n_partial_: true",
        "misspelt_variation": "defaults: [baseline]\njiter: scaled",
    }.items():
        (tmp_path / f"schedule/{name}.yaml").write_text(f"{keys}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_schedules", raising=False)
    return tmp_path


def test_a_schedule_outside_the_checkout_makes_the_plan(
    schedule_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config-dir", str(schedule_folder), "schedule=one_phase", "schedule.end=6", "videos=1024", "gpus=1"]
    main([*command, "format=json"])
    result = json.loads(capsys.readouterr().out)
    assert (result["schedule"], result["max_epoch"], len(result["phases"])) == ("one_phase", 6, 1)
    main([*command, "format=png", f"out={schedule_folder / 'plan.png'}"])
    assert (schedule_folder / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule=misspelt"], "error: schedule: own_schedules.one_phase: got an unexpected keyword argument 'ends'"),
        (["schedule=misspelt_variation"], "error: schedule: mgvideo.plan.schedules.baseline: got an unexpected"),
        (["schedule=incomplete"], "error: schedule: own_schedules.one_phase: missing a required argument: 'end'"),
        (["schedule=not_partial"], "error: schedule: "),
        (["schedule=no_plan"], "error: schedule: own_schedules.no_plan returned no Plan but list"),
        (["schedule=baseline", "schedule.jitter=scaled"], "error: schedule.jitter is not a key of this config"),
        (["schedule=short", "schedule.fine_tune=true"], "error: schedule.fine_tune is not a key of this config"),
        (["schedule=long", "schedule.long_factors=[[2,1]]"], "error: schedule.long_factors: [2, 1]: give pairs"),
    ],
)
def test_wrong_keys_of_a_schedule_are_one_line(
    arguments: list[str], message: str, schedule_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--config-dir", str(schedule_folder), *arguments, "videos=1024", "gpus=1"]
    assert error_line(main, command, capsys).startswith(message)


def test_all_schedules_are_listed_for_a_budget_with_time_and_evidence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = tmp_path / "benchmark.json"
    grids = {f"{frames}x{size}": 0.5 for frames in (4, 8, 16) for size in (32, 45, 64)}
    benchmark.write_text(json.dumps({"step_seconds": grids}))
    budget = ["schedule=cooldown", "schedule.budget=0.2", f"schedule.benchmark={benchmark}"]
    printed = run_show(["videos=1024", "gpus=1", "recommend=true"], budget, capsys)
    table = printed.partition("FLOPs are relative")[0]
    rows = {words[0]: words for line in table.splitlines() if len(words := line.split()) > 4}
    for name in set(group_options()["schedule"]):
        assert 250 <= int(rows[name][2]) <= 256, "a fifth of 1,280 steps of equal time"
        assert rows[name][4:6] in (["2:08", "min"], ["2:07", "min"], ["2:06", "min"], ["2:05", "min"])
    assert "published evidence favours multigrid: " in printed
    assert "toy scale evidence favours cooldown: " in printed
    assert "random may be better: not measured yet" in printed
    shortest = run_show(["videos=1024", "gpus=1", "recommend=true"], ["schedule.budget=0.12"], capsys)
    assert "baseline does not fit: schedule.budget=0.12: no run is that short: raise it" in shortest
    with pytest.raises(UserError, match=r"recommend=true prints a table: leave out format=json"):
        read_keys(["recommend=true", "format=json"])


def test_plans_of_all_schedules_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("random", "cooldown"):
        run_show(
            ["videos=1024", "gpus=1", "format=png", f"out={tmp_path / name}"],
            [f"schedule={name}", "schedule.finish=all", "test.crop_size=80"],
            capsys,
        )
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"schedule\.decay_from=now: add resume=PATH"):
        run_show(["videos=1024"], ["schedule=cooldown", "schedule.decay_from=now"], capsys)


def test_json_has_what_is_particular_to_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["schedule.strength=volume", "schedule.finish=head", "test.crop_size=80"]
    result = json.loads(run_show(["videos=1024", "format=json", "gpus=1"], ["schedule=random", *options], capsys))
    slots = result["phases"][0]["short_cycle"]
    assert [(slot.get("frames", 16), slot["crop"], slot["weight"]) for slot in slots] == [
        (4, 45, 1), (8, 45, 1), (8, 64, 1), (16, 64, 1),
    ]  # fmt: skip
    assert [slot.get("strength", 1) for slot in slots] == [0.3516, 0.4972, 0.7071, 1]
    assert result["phases"][-1]["trains"] == "head"
    plain = json.loads(run_show(["videos=1024", "format=json", "gpus=1"], [], capsys))
    assert not {"trains"} & plain["phases"][0].keys()
    assert plain["phases"][0]["short_cycle"][0].keys() == {"crop", "batch", "per_gpu_batch", "short_side_range"}
