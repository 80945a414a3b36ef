"""Cost, clips per GPU and BN layout of a plan, and times predicted from benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipes import CHARADES, KINETICS, KINETICS_CLIPS, SCHEDULES

from mgvideo.errors import UserError
from mgvideo.plan.forecast import (
    Benchmark,
    bn_layout,
    clips_per_gpu,
    group_phases_by_slots,
    predict_phase_times,
    read_benchmark,
    suggest_loader_changes,
    total_cost,
)
from mgvideo.plan.plan import Plan
from mgvideo.plan.schedules import Schedule, baseline, multigrid

PLAN = multigrid(KINETICS, KINETICS_CLIPS)


def table_for_all_grids(plan: Plan, value: float) -> dict[str, float]:
    return {slot.grid.name: value for phase in plan.phases for slot in phase.slots}


def test_cost_counts_every_step() -> None:
    plan = multigrid(CHARADES, 1000)
    steps = (plan.slot(step) for step in range(plan.steps))
    assert total_cost(plan.phases) == sum(slot.batch * slot.grid.volume for slot in steps)


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=lambda schedule: schedule.__name__)
def test_saving_in_pixels_follows_steps(schedule: Schedule) -> None:
    plan, recipe = schedule(KINETICS, KINETICS_CLIPS), baseline(KINETICS, KINETICS_CLIPS)
    saving = recipe.steps / plan.steps
    assert total_cost(recipe.phases) / total_cost(plan.phases) == pytest.approx(saving, rel=0.02)
    assert saving > 1.5


@pytest.mark.parametrize(
    ("gpus", "layout"), [(1, ("sub", 64)), (8, ("sub", 8)), (64, ("plain", 1)), (128, ("sync", 2))]
)
def test_batch_norm_groups_on_gpus(gpus: int, layout: tuple[str, int]) -> None:
    assert bn_layout(PLAN.phases[0], gpus) == layout


def test_clips_per_gpu_differ_if_gpus_do_not_divide_the_batch() -> None:
    assert clips_per_gpu(PLAN.phases[0], PLAN.phases[0].slots[-1], 3) == (21 * 8, 22 * 8)


def test_phases_are_grouped_by_slots() -> None:
    assert group_phases_by_slots(PLAN) == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11, 12, 13]]


def test_phase_time_is_the_larger_of_compute_and_loading_time() -> None:
    benchmark = Benchmark(table_for_all_grids(PLAN, 0.5), table_for_all_grids(PLAN, 100.0), workers=8)
    times = predict_phase_times(PLAN, 8, benchmark)
    assert [time.compute_s for time in times] == [pytest.approx(0.5 * phase.num_steps) for phase in PLAN.phases]
    assert [time.loading_s for time in times] == [pytest.approx(phase.clips() / 8 / 100) for phase in PLAN.phases]
    assert times[0].wait_fraction == pytest.approx(1 - 0.5 / (2048 / 3 / 8 / 100), rel=1e-3)
    assert times[3].wait_fraction == 0
    assert times[3].seconds == times[3].compute_s
    (line,) = suggest_loader_changes(PLAN, times, 8)
    assert line.startswith("phase 1, 5, 9 (8x158) waits 41%")
    assert "1.7× as many workers per GPU (14 instead of 8)" in line
    assert "pyramid" in line


def test_step_time_is_proportional_to_clips() -> None:
    clips = dict.fromkeys(table_for_all_grids(PLAN, 1.0), 10)
    benchmark = Benchmark(table_for_all_grids(PLAN, 0.1), step_clips=clips)
    one_gpu, eight_gpus = (sum(time.seconds for time in predict_phase_times(PLAN, gpus, benchmark)) for gpus in (1, 8))
    assert one_gpu == pytest.approx(8 * eight_gpus)


def test_benchmark_file_lacks_a_grid_of_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"step_seconds": {"8x112": 0.3}, "device": "a laptop"}))
    with pytest.raises(UserError, match=r"step_seconds has no grid .* \(it has 8x112\)"):
        predict_phase_times(PLAN, 8, read_benchmark(path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"step_seconds": {"8x112": -1}}', '{"step_seconds": 3}'])
def test_invalid_benchmark_files_raise(tmp_path: Path, text: str) -> None:

    path = tmp_path / "benchmark.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"benchmark\.json"):
        read_benchmark(path)
