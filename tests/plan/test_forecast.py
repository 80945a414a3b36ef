"""What a plan asks of GPUs and loaders, and predictions from measured times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes import CHARADES, KINETICS, KINETICS_CLIPS, MULTIGRID, SCHEDULES

from mgvideo.errors import UserError
from mgvideo.plan.forecast import Benchmark, bn_layout, by_grid, cost, gpu_shares, predict, read_benchmark, remedies
from mgvideo.plan.plan import Plan
from mgvideo.plan.schedules import BASELINE, make_plan

PLAN = make_plan(KINETICS, MULTIGRID, KINETICS_CLIPS)


def every_grid(plan: Plan, value: float) -> dict[str, float]:
    return {slot.grid.name: value for phase in plan.phases for slot in phase.slots}


def test_cost_counts_every_step() -> None:
    plan = make_plan(CHARADES, MULTIGRID, 1000)
    steps = (plan.slot(step) for step in range(plan.steps))
    assert cost(plan.phases) == sum(slot.batch * slot.grid.volume for slot in steps)


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=lambda schedule: schedule.name)
def test_saving_in_pixels_follows_steps(schedule: object) -> None:
    plan, baseline = make_plan(KINETICS, schedule, KINETICS_CLIPS), make_plan(KINETICS, BASELINE, KINETICS_CLIPS)
    saving = baseline.steps / plan.steps
    assert cost(baseline.phases) / cost(plan.phases) == pytest.approx(saving, rel=0.02)
    assert saving > 1.5


@pytest.mark.parametrize(
    ("gpus", "layout"), [(1, ("sub", 64)), (8, ("sub", 8)), (64, ("plain", 1)), (128, ("sync", 2))]
)
def test_batch_norm_groups_on_gpus(gpus: int, layout: tuple[str, int]) -> None:
    assert bn_layout(PLAN.phases[0], gpus) == layout


def test_shares_of_gpus_that_do_not_divide_the_batch() -> None:
    assert gpu_shares(PLAN.phases[0], PLAN.phases[0].slots[-1], 3) == (21 * 8, 22 * 8)


def test_phases_by_grid() -> None:
    assert by_grid(PLAN) == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11, 12, 13]]


def test_time_is_the_slower_of_computing_and_loading() -> None:
    benchmark = Benchmark(every_grid(PLAN, 0.5), every_grid(PLAN, 100.0), workers=8)
    times = predict(PLAN, 8, benchmark)
    assert [time.compute for time in times] == [pytest.approx(0.5 * phase.length) for phase in PLAN.phases]
    assert [time.loading for time in times] == [pytest.approx(phase.clips() / 8 / 100) for phase in PLAN.phases]
    assert times[0].waiting == pytest.approx(1 - 0.5 / (2048 / 3 / 8 / 100), rel=1e-3)
    assert times[3].waiting == 0
    assert times[3].seconds == times[3].compute
    (line,) = remedies(PLAN, times, 8)
    assert line.startswith("phase 1, 5, 9 (8x158) waits 41%")
    assert "1.7× as many workers a GPU (14 instead of 8)" in line
    assert "pyramid" in line


def test_steps_of_other_clips_take_time_in_proportion() -> None:
    clips = dict.fromkeys(every_grid(PLAN, 1.0), 10)
    one, many = (predict(PLAN, gpus, Benchmark(every_grid(PLAN, 0.1), step_clips=clips)) for gpus in (1, 8))
    assert sum(time.seconds for time in one) == pytest.approx(8 * sum(time.seconds for time in many))


def test_benchmark_files(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"step_seconds": {"8x112": 0.3}, "device": "a laptop"}))
    with pytest.raises(UserError, match=r"step_seconds has no grid .* \(it has 8x112\)"):
        predict(PLAN, 8, read_benchmark(path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step_seconds": {"8x112": -1}}', '{"step_seconds": 3}'])
def test_benchmark_files_that_make_no_sense(tmp_path: Path, text: str) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"benchmark\.json"):
        read_benchmark(path)
