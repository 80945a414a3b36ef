"""The time in which each schedule of a table reaches the accuracy of the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mgvideo.plan.formatting import format_duration

from .results import METRICS, ReportRow, Results


@dataclass(frozen=True)
class TimeToAccuracy:
    """When a schedule reaches the accuracy that the whole baseline ends with, on one row of the table.

    `seconds` is None if no budget of the table reaches it. It is an upper bound if the shortest run already does.
    """

    row: str
    schedule: str
    seconds: float | None
    is_bound: bool
    baseline_seconds: float
    best: float  # highest mean accuracy of the schedule, percent

    @property
    def times_less(self) -> float | None:
        """How many times less time than the whole baseline."""
        return self.baseline_seconds / self.seconds if self.seconds else None


def times_to_accuracy(results: Results) -> list[TimeToAccuracy]:
    """Return the times of all schedules, those of each row from fast to slow.

    The accuracy of a training time between two budgets is interpolated over the logarithm of the time, between the
    means over seeds. Cells that ran beside another number of runs, or on other hardware, than the baseline are left
    out.
    """
    times = []
    for target in [row for row in results.rows if results.table.baseline_of(row.cell) is row.cell and row.trained]:
        members = [
            row
            for row in results.rows
            if row.trained and row.cell.row == target.cell.row and "clock" in results.savings(row)
        ]
        found = []
        for schedule in dict.fromkeys(row.schedule for row in members):
            points = sorted((row.seconds, _mean(row)) for row in members if row.schedule == schedule)
            seconds, is_bound = _first_time(points, _mean(target))
            best = max(accuracy for _, accuracy in points)
            found.append(TimeToAccuracy(target.cell.row, schedule, seconds, is_bound, target.seconds, best))
        times += sorted(found, key=lambda time: time.seconds or math.inf)
    return times


def _mean(row: ReportRow) -> float:
    return (row.score(str(row.metric)) or (0.0, 0.0))[0]


def _first_time(points: Sequence[tuple[float, float]], target: float) -> tuple[float | None, bool]:
    """Return the seconds at which the line through (seconds, accuracy) reaches the target, None if it does not.

    The second value is whether that is an upper bound, because the first point already does.
    """
    if points[0][1] >= target:
        return points[0][0], True
    for (start, low), (end, high) in pairwise(points):
        if high >= target:
            fraction = (target - low) / (high - low)
            return math.exp(math.log(start) + fraction * math.log(end / start)), False
    return None, False


def describe_times(results: Results) -> Iterator[str]:
    """Yield the lines of a Markdown table of the times, and a sentence on the fastest schedule of each row."""
    times = times_to_accuracy(results)
    if not times:
        return
    metric = METRICS[str(next(row.metric for row in results.rows if row.trained))]
    yield f"## Time to the accuracy of the whole {results.table.baseline}"
    yield ""
    yield f"| network | schedule | time | times less | highest {metric}, % |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for time in times:
        prefix = "≤ " if time.is_bound else ""
        reached = prefix + format_duration(time.seconds) if time.seconds else "not reached"
        factor = f"{'≥ ' if time.is_bound else ''}{time.times_less:.2f}×" if time.times_less else "–"
        yield f"| {time.row or '–'} | {time.schedule} | {reached} | {factor} | {time.best:.2f} |"
    yield ""
    for row in dict.fromkeys(time.row for time in times):
        first = next(time for time in times if time.row == row)
        if first.times_less:
            bound = "at least " if first.is_bound else ""
            where = f"{row}: " if row else ""
            text = f"{where}{first.schedule} reaches it first, in {bound}{first.times_less:.2f} times less time"
            yield f"- {text}; means over seeds, interpolated between budgets"
