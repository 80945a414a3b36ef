"""Figures of a result table: accuracy over training time, and validation curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from mgvideo.plan.figure import INK, style_axes

from .results import METRICS, ReportRow, Results

TIME_UNITS = (  # (from so many seconds, length of the unit in seconds, name)
    (3 * 86400, 86400, "days"),
    (3 * 3600, 3600, "hours"),
    (180, 60, "minutes"),
    (0, 1, "seconds"),
)
COLOURS = {"baseline": "#5b7fa6", "short": "#e0a03c", "long": "#4c9f79", "multigrid": "#d1495b"}
COLOURS |= {"monotone": "#8d6cab", "cooldown": "#5fa8b8", "random": "#a0785a"}
OTHER_COLOURS = ("#8d6cab", "#4c9f79", "#e0a03c", "#5fa8b8", "#a0785a", "#c77fa8", "#7d8f3c", "#5b7fa6")


def draw_results(results: Results, folder: Path) -> list[str]:
    """Draw the figures of all measured rows as SVG and PNG; returns their file names without the suffix."""
    rows = [row for row in results.rows if row.trained and row.metric]
    names = []
    if rows and results.table.figure == "time":
        names.append(_save(_accuracy_over_time(rows), folder, "accuracy_over_time"))
    if rows and results.table.figure == "factors":
        names.append(_save(_accuracy_by_schedule(rows), folder, "tradeoff"))
    if rows and results.table.figure == "budgets":
        names.append(_save(_accuracy_by_budget(rows), folder, "budgets"))
    if rows and results.table.figure == "dots":
        names.append(_save(_accuracy_dots(rows), folder, "accuracy"))
    curves = [row for row in rows if len(_mean_curve(row)[1]) > 1]  # others were validated only at the end, or never
    if curves:
        names.append(_save(_learning_curves(curves), folder, "learning"))
    return names


def _save(figure: Figure, folder: Path, name: str) -> str:
    """Save a figure as reproducible SVG and as PNG; returns `name`."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", format="png", dpi=150, facecolor="white")
    return name


def _accuracy_over_time(rows: list[ReportRow]) -> Figure:
    """Draw accuracy over training time, one point a cell."""
    figure, axes, unit = _make_axes(rows)
    colours = _choose_colours(rows)
    for row in rows:
        x, y = _draw_point(axes, row, colours[row.cell.name], unit)
        _draw_label(axes, row.cell.column or row.cell.name, x, y, colours[row.cell.name])
    return figure


def _accuracy_by_schedule(rows: list[ReportRow]) -> Figure:
    """Draw accuracy over training time, one line a schedule; labels are epochs relative to the recipe's."""
    figure, axes, unit = _make_axes(rows)
    lines: dict[str, list[ReportRow]] = defaultdict(list)
    for row in rows:
        lines[row.schedule].append(row)
    for i, (schedule, members) in enumerate(lines.items()):
        colour = COLOURS.get(schedule, OTHER_COLOURS[0])
        points = sorted(
            (*_draw_point(axes, row, colour, unit), f"{row.plan.epochs / row.plan.base.epochs:.2g}×") for row in members
        )
        axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=colour, label=schedule, linewidth=1.8)
        for x, y, factor in points:
            _draw_label(axes, factor, x, y, colour, above=i % 2 == 1)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure


def _accuracy_by_budget(rows: list[ReportRow]) -> Figure:
    """Draw accuracy over training time, one panel a row of the table, one line a schedule, with error bars over seeds.

    A dashed line is the accuracy of the longest baseline.
    """
    panels: dict[str, list[ReportRow]] = defaultdict(list)
    for row in rows:
        panels[row.cell.row].append(row)
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, members) in zip(grid.flat, panels.items(), strict=True):
        unit = _set_up_time_axis(axes, members)
        for schedule in dict.fromkeys(row.schedule for row in members):
            colour = COLOURS.get(schedule, OTHER_COLOURS[0])
            points = sorted(_draw_point(axes, row, colour, unit) for row in members if row.schedule == schedule)
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, label=schedule, linewidth=1.8)
        baselines = [row for row in members if row.schedule == "baseline"]
        if baselines:
            whole = max(baselines, key=lambda row: row.seconds)
            axes.axhline(
                (whole.score(str(whole.metric)) or (0.0,))[0], color=COLOURS["baseline"], dashes=(4, 3), linewidth=1
            )
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.legend(frameon=False, labelcolor=INK, loc="lower right", fontsize=9)
    return figure


def _accuracy_dots(rows: list[ReportRow]) -> Figure:
    """Draw accuracies as dots, on one line for each row of the table, or for each cell if it has no rows.

    Dots have the schedule's colour. The second cell of a schedule on a line is a ring, which the legend names after its
    column.
    """
    line_of_row = [row.cell.row or row.cell.column or row.cell.name for row in rows]
    lines = list(dict.fromkeys(line_of_row))
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * len(lines)), layout="constrained")
    axes = figure.subplots()
    drawn: set[tuple[str, str]] = set()
    for row, line in zip(rows, line_of_row, strict=True):
        mean, deviation = row.score(str(row.metric)) or (0.0, 0.0)
        colour = COLOURS.get(row.schedule, OTHER_COLOURS[0])
        is_second = (line, row.schedule) in drawn
        drawn.add((line, row.schedule))
        label = row.cell.column if is_second else row.schedule
        fill_colour = "white" if is_second else colour
        axes.errorbar(
            [mean],
            [lines.index(line)],
            xerr=deviation or None,
            fmt="o",
            color=colour,
            markerfacecolor=fill_colour,
            markersize=7,
            capsize=3,
            label=label,
        )
    axes.set_yticks(range(len(lines)), [fill(line, 30) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(f"{' or '.join(dict.fromkeys(METRICS[str(row.metric)] for row in rows))}, %", color=INK)
    style_axes(axes, grid=True)
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one for each label
    figure.legend(
        entries.values(), entries, loc="outside upper right", ncols=4, frameon=False, labelcolor=INK, fontsize=9
    )
    return figure


def _learning_curves(rows: list[ReportRow]) -> Figure:
    """Draw the validation metric over training time, averaged over seeds, in one panel for each row of the table."""
    panels: dict[str, list[ReportRow]] = defaultdict(list)
    for row in rows:
        panels[row.cell.row].append(row)
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    size = (7.2, 4.2) if num_columns == 1 else (3.6 * num_columns, 2.9 * num_rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, members) in zip(grid.flat, panels.items(), strict=False):
        colours = _choose_colours(members)
        unit, name = _time_unit(max(row.seconds for row in members))
        for row in members:
            seconds, values = _mean_curve(row)
            axes.plot(seconds / unit, values, color=colours[row.cell.name], linewidth=1.8, marker="o", markersize=3.5)
            axes.plot([], [], color=colours[row.cell.name], label=row.cell.column or row.cell.name)
        style_axes(axes, grid=True)
        axes.set_title(fill(title, 36), loc="left", fontsize=10, color=INK)
        axes.set_xlabel(f"training time, {name}", color=INK)
        axes.set_ylabel(f"validation {METRICS[str(members[0].metric)]}, %", color=INK)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return figure


def _mean_curve(row: ReportRow) -> tuple[np.ndarray, np.ndarray]:
    """Return seconds and validation metric, averaged over seeds.

    Seeds are evaluated at the same steps; a resumed run may lack some, so the shortest curve sets the length.
    """
    curves = [outcome.curve for outcome in row.outcomes]
    length = min(len(curve) for curve in curves)
    mean = np.array([curve[:length] for curve in curves]).reshape(len(curves), length, 2).mean(0)
    return mean[:, 0], mean[:, 1]


def _time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit for a duration: its length in seconds and its name."""
    return next((length, name) for least, length, name in TIME_UNITS if seconds >= least)


def _make_axes(rows: list[ReportRow]) -> tuple[Figure, Axes, float]:
    """Return a figure with axes of accuracy over log training time, and the time unit in seconds."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    return figure, axes, _set_up_time_axis(axes, rows)


def _set_up_time_axis(axes: Axes, rows: list[ReportRow]) -> float:
    """Make the x axis one of log training time, and the y axis one of accuracy; returns the time unit in seconds."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    unit, name = _time_unit(max(row.seconds for row in rows))
    times = [row.seconds / unit for row in rows]
    narrow = max(times) < 6 * min(times)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if narrow else (1, 2, 5)))
    axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
    axes.set_xlabel(f"training time, {name} (log scale)", color=INK)
    axes.set_ylabel(f"{METRICS[str(rows[0].metric)]}, %", color=INK)
    style_axes(axes, grid=True)
    return unit


def _draw_point(axes: Axes, row: ReportRow, colour: str, unit: float) -> tuple[float, float]:
    """Draw a row's point with its error bar; returns x and y."""
    mean, deviation = row.score(str(row.metric)) or (0.0, 0.0)
    bars = deviation if deviation else None
    x = row.seconds / unit
    axes.errorbar([x], [mean], yerr=bars, fmt="o", color=colour, markersize=7, capsize=3, elinewidth=1.2)
    return x, mean


def _draw_label(axes: Axes, text: str, x: float, y: float, colour: str, above: bool = True) -> None:
    """Write text beside a point, where a rising line through it does not pass."""
    offset, side = ((-6, 6), "right") if above else ((7, -13), "left")
    axes.annotate(text, (x, y), offset, textcoords="offset points", fontsize=9, color=colour, weight="bold", ha=side)


def _choose_colours(rows: Iterable[ReportRow]) -> dict[str, str]:
    """Return a colour for each cell: the first cell of a schedule gets the schedule's colour."""
    rows, palette = list(rows), cycle(OTHER_COLOURS)
    colours: dict[str, str] = {}
    for row in rows:
        colour = COLOURS.get(row.schedule)
        colours[row.cell.name] = colour if colour and colour not in colours.values() else ""
    used = set(colours.values())
    return {name: colour or next(other for other in palette if other not in used) for name, colour in colours.items()}
