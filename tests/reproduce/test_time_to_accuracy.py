"""When a schedule reaches the accuracy of the baseline, from the points of a table."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from recipes import SMALL

from mgvideo.plan.coarse_to_fine import cooldown, monotone
from mgvideo.plan.plan import Plan
from mgvideo.plan.schedules import baseline, multigrid
from mgvideo.reproduce.figure import draw_results
from mgvideo.reproduce.results import Outcome, ReportRow, Results
from mgvideo.reproduce.tables import Cell, Preset, ResultTable
from mgvideo.reproduce.time_to_accuracy import describe_times, times_to_accuracy

PLANS = {f.__name__: partial(f, SMALL, 1024)() for f in (baseline, multigrid, monotone, cooldown)}


def report_row(name: str, column: str, seconds: float, scores: tuple[float, ...], at_once: int = 1) -> ReportRow:
    plan: Plan = PLANS[name]
    outcomes = tuple(
        Outcome(i, {"train_seconds": seconds, "metrics": {"top1": score}, "hardware": "a GPU"}, plan, (), at_once)
        for i, score in enumerate(scores)
    )
    return ReportRow(Cell(f"{name} {column}", row="SlowFast", column=column), outcomes, flops=1.0)


def results(*rows: ReportRow) -> Results:
    preset = Preset("motion", "", (), (0,), 1)
    table = ResultTable("race", "Race", "", "baseline", "budgets", tuple(row.cell for row in rows), preset)
    return Results(table, rows, "command")


RACE = results(
    report_row("baseline", "baseline", 100, (90, 94)),  # 92 %
    report_row("baseline", "baseline 0.5", 50, (80, 80)),
    report_row("multigrid", "long + short 0.5", 40, (96, 96)),
    report_row("multigrid", "long + short 0.25", 10, (88, 88)),
    report_row("monotone", "monotone 0.1", 8, (93, 95)),
    report_row("cooldown", "cooldown 0.5", 45, (91, 91)),
    report_row("cooldown", "cooldown 0.2", 20, (99, 99), at_once=4),  # not comparable
)


def test_times_are_interpolated_and_sorted() -> None:
    times = {time.schedule: time for time in times_to_accuracy(RACE)}
    assert list(times) == ["monotone", "multigrid", "baseline", "cooldown"]
    assert times["multigrid"].seconds == pytest.approx(math.sqrt(10 * 40))  # half-way in accuracy and in log time
    assert times["multigrid"].times_less == pytest.approx(5)
    assert (times["monotone"].seconds, times["monotone"].is_bound) == (8, True)
    assert times["baseline"].times_less == pytest.approx(1)
    assert (times["cooldown"].seconds, times["cooldown"].best) == (None, 91)


def test_the_report_says_which_schedule_is_first() -> None:
    lines = list(describe_times(RACE))
    assert lines[0] == "## Time to the accuracy of the whole baseline"
    assert "| SlowFast | monotone | ≤ 8 s | ≥ 12.50× | 94.00 |" in lines
    assert "| SlowFast | multigrid | 20 s | 5.00× | 96.00 |" in lines
    assert "| SlowFast | cooldown | not reached | – | 91.00 |" in lines
    assert lines[-1].startswith("- SlowFast: monotone reaches it first, in at least 12.50 times less time")


def test_nothing_is_said_without_the_baseline() -> None:
    assert list(describe_times(results(*RACE.rows[1:]))) == []


def test_the_figure_has_a_panel_for_each_row(tmp_path: Path) -> None:
    assert draw_results(RACE, tmp_path) == ["budgets"]
    assert (tmp_path / "budgets.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "budgets.svg").read_text()
    assert all(word in svg for word in ("SlowFast", "monotone", "cooldown", "training time"))


def test_a_second_baseline_on_a_line_is_named_and_there_are_no_empty_learning_curves(tmp_path: Path) -> None:
    dots = replace(RACE, table=replace(RACE.table, figure="dots"))
    assert draw_results(dots, tmp_path) == ["accuracy"]
    svg = (tmp_path / "accuracy.svg").read_text()
    assert all(svg.count(f">{label}<") == 1 for label in ("baseline", "baseline 0.5", "multigrid", "cooldown 0.2"))
