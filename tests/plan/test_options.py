"""Options of every schedule: budgets, measured batches, a finish, and the strength of augmentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recipes import ALL_SCHEDULES, KINETICS, KINETICS_CLIPS, SMALL

from mgvideo.errors import UserError
from mgvideo.plan.coarse_to_fine import cooldown, monotone
from mgvideo.plan.forecast import predict_phase_times, read_benchmark, total_cost
from mgvideo.plan.options import ScheduleOptions, statistics_plan
from mgvideo.plan.plan import Plan
from mgvideo.plan.schedules import Schedule, baseline, baseline_of, multigrid, short


@pytest.fixture
def benchmark(tmp_path: Path) -> str:
    """A benchmark of SMALL's grids, in which coarse clips cost more than their volume says."""
    path = tmp_path / "step.json"
    grids = {"4x32": 0.5, "4x45": 0.6, "8x32": 0.7, "8x45": 1.0, "8x64": 1.5, "16x32": 1.1, "16x45": 1.6, "16x64": 3.0}
    path.write_text(json.dumps({"step_seconds": grids, "step_clips": dict.fromkeys(grids, 16)}))
    return str(path)


def pixels(plan: Plan) -> float:
    return total_cost(plan.phases) / total_cost(baseline_of(plan).phases)


def test_without_options_plans_are_unchanged() -> None:
    for schedule in ALL_SCHEDULES:
        assert ScheduleOptions().apply(schedule)(KINETICS, KINETICS_CLIPS) == schedule(KINETICS, KINETICS_CLIPS)
        assert not {"batch_multipliers"} & schedule(SMALL, 1024).to_json()["base"].keys()
    phase = multigrid(SMALL, 1024).to_json()["phases"][0]
    assert not {"weights", "draw_seed", "trains"} & phase.keys()
    assert phase["slots"][0].keys() == {"grid", "batch"}


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
def test_a_budget_sets_the_epoch_factor(schedule: Schedule) -> None:
    plan = ScheduleOptions(budget=0.15).apply(schedule)(KINETICS, KINETICS_CLIPS)
    assert 0.14 < pixels(plan) <= 0.15
    assert plan.notes[0].startswith("schedule.budget=0.15: epoch_factor=")
    factor = float(plan.notes[0].split("epoch_factor=")[1].split()[0])
    assert schedule(KINETICS, KINETICS_CLIPS, epoch_factor=factor).steps == pytest.approx(plan.steps, rel=0.01)  # type: ignore[call-arg]


def test_hours_and_a_budget_in_predicted_time(benchmark: str) -> None:
    measured = read_benchmark(benchmark)

    def hours(plan: Plan, gpus: int) -> float:
        return sum(time.seconds for time in predict_phase_times(plan, gpus, measured)) / 3600

    for gpus in (1, 2):
        plan = ScheduleOptions(hours=0.5, benchmark=benchmark, gpus=gpus).apply(monotone)(SMALL, 4096)
        assert 0.48 < hours(plan, gpus) <= 0.5
    assert plan.notes[0].endswith("30:00 min of training on 2 GPUs, as predicted") or "29:" in plan.notes[0]
    plan = ScheduleOptions(budget=0.5, benchmark=benchmark).apply(monotone)(SMALL, 4096)
    assert hours(plan, 1) / hours(baseline(SMALL, 4096), 1) == pytest.approx(0.5, abs=0.01)
    assert pixels(plan) < 0.45  # coarse clips are dearer here than their pixels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1e-5}, "schedule.budget=1e-05: no run is that short: raise it, as the shortest of this"),
        ({"budget": 5000}, "schedule.budget=5000: it allows more than 64 times the recipe's epochs: lower it"),
        ({"budget": 0}, "schedule.budget=0: give a number above 0"),
        ({"budget": 0.5, "hours": 1}, "give schedule.budget or schedule.hours, not both"),
        ({"hours": 1}, "schedule.hours=1: add schedule.benchmark=FILE"),
        ({"batches": "measured"}, "schedule.batches=measured: add schedule.benchmark=FILE"),
        ({"hours": 1, "benchmark": "/none.json"}, "benchmark=/none.json: cannot be read"),
        ({"strength": "high"}, "schedule.strength=high: choose one of constant, volume"),
        ({"finish": "tail"}, "schedule.finish=tail: choose one of null, head, all"),
        ({"batches": "equal"}, "schedule.batches=equal: choose one of volume, measured"),
        ({"finish": "all", "finish_epochs": -1}, "schedule.finish_epochs=-1: give a number above 0"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        ScheduleOptions(**options).apply(multigrid)(KINETICS, KINETICS_CLIPS)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_schedule_without_epoch_factor_has_no_budget() -> None:
    def fixed(base: Any, dataset_size: int) -> Plan:
        return baseline(base, dataset_size)

    with pytest.raises(UserError, match=r"schedule\.budget: this schedule has no key epoch_factor"):
        ScheduleOptions(budget=0.5).apply(fixed)(SMALL, 1024)


def test_measured_batches_take_equal_time(benchmark: str) -> None:
    measured = read_benchmark(benchmark)
    plan = ScheduleOptions(batches="measured", benchmark=benchmark).apply(multigrid)(SMALL, 4096)
    slots = {slot for phase in plan.phases for slot in phase.slots}
    seconds = [measured.step_time_s(slot.grid, slot.batch) for slot in slots]
    assert max(seconds) / min(seconds) < 1.3
    coarsest = plan.phases[0]
    assert (coarsest.grid.name, coarsest.batch, coarsest.lr_factor) == ("4x45", 5 * 16, 5)
    assert multigrid(SMALL, 4096).phases[0].batch == 8 * 16
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert baseline_of(plan).phases[0].batch == 16


def test_measured_batches_require_every_grid(benchmark: str) -> None:
    path = Path(benchmark)
    for grids, message in (
        ({"4x45": 1.0}, r"step_seconds has no grid 16x64, that of the recipe"),
        ({"16x64": 1.0}, r"schedule\.benchmark has no grid 16x32 \(it has 16x64\): measure it too"),
        ({"16x64": 1.0, "big": 1.0}, r"big is no grid"),
    ):
        path.write_text(json.dumps({"step_seconds": grids}))
        with pytest.raises(UserError, match=message):
            ScheduleOptions(batches="measured", benchmark=benchmark).apply(short)(SMALL, 1024)


def test_strength_grows_with_the_volume_of_the_grid() -> None:
    plan = ScheduleOptions(strength="volume").apply(multigrid)(KINETICS, KINETICS_CLIPS)
    strengths = {slot.grid.name: slot.strength for phase in plan.phases for slot in phase.slots}
    assert (strengths["32x224"], strengths["16x224"]) == (1, pytest.approx(0.5**0.5, abs=1e-4))
    assert strengths["8x158"] == pytest.approx(0.353, abs=1e-3)
    constant = multigrid(KINETICS, KINETICS_CLIPS)
    assert {slot.strength for phase in constant.phases for slot in phase.slots} == {1.0}
    assert [p.steps for p in plan.phases] == [p.steps for p in constant.phases]


def test_a_finish_is_a_short_last_phase_at_the_test_grid() -> None:
    for schedule in ALL_SCHEDULES:
        plain = schedule(KINETICS, KINETICS_CLIPS)
        plan = ScheduleOptions(finish="head", finish_size=256).apply(schedule)(KINETICS, KINETICS_CLIPS)
        *rest, last = plan.phases
        assert [phase.steps for phase in rest] == [phase.steps for phase in plain.phases]
        assert [plan.lr(s) for s in range(0, plain.steps, 997)] == [plain.lr(s) for s in range(0, plain.steps, 997)]
        assert (last.grid.name, last.grid.strides, last.grid.scales) == ("32x256", (2, 2), (256, 256))
        assert (last.trains, last.batch, last.num_steps, last.bn_groups) == ("head", 64, KINETICS_CLIPS // 64, 8)
        assert {phase.trains for phase in rest} == {"all"}
        assert plan.lr(last.steps[0]) == pytest.approx(0.001)
        assert plan.lr(plan.steps - 1) < 1e-6
        assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
        assert statistics_plan(plan).phases[0].grid == last.grid
        assert statistics_plan(plain) == baseline_of(plain)


def test_the_finish_counts_for_the_budget() -> None:
    plan = ScheduleOptions(budget=0.2, finish="all", finish_size=256, finish_epochs=2).apply(cooldown)(
        KINETICS, KINETICS_CLIPS
    )
    assert plan.phases[-1].trains == "all"
    assert 0.19 < pixels(plan) <= 0.2
