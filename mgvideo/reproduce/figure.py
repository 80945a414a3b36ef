"""A table's figures: accuracy over training time, and what each run had learnt by when."""

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

from mgvideo.plan.figure import INK

from .results import METRICS, ReportRow, Results

SOFT = "#b0b0b0"
UNITS = ((3 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
COLOURS = {"baseline": "#5b7fa6", "short": "#e0a03c", "long": "#4c9f79", "multigrid": "#d1495b"}
OTHERS = ("#8d6cab", "#4c9f79", "#e0a03c", "#5fa8b8", "#a0785a", "#c77fa8", "#7d8f3c", "#5b7fa6")


def draw_results(results: Results, folder: Path) -> list[str]:
    """Draws the figures of what is there as SVG and PNG; their names, without the ending."""
    rows = [row for row in results.rows if row.trained and row.metric]
    drawn = []
    if rows and results.table.figure == "time":
        drawn.append(_save(_over_time(rows), folder, "accuracy_over_time"))
    if rows and results.table.figure == "factors":
        drawn.append(_save(_trade_off(rows), folder, "tradeoff"))
    if rows and results.table.figure == "dots":
        drawn.append(_save(_dots(rows), folder, "accuracy"))
    if any(len(outcome.curve) > 1 for row in rows for outcome in row.outcomes):
        drawn.append(_save(_learning(results, rows), folder, "learning"))
    return drawn


def _save(figure: Figure, folder: Path, name: str) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", format="png", dpi=150, facecolor="white")
    return name


def _over_time(rows: list[ReportRow]) -> Figure:
    """A point a cell."""
    figure, axes, unit = _axes(rows)
    colours = _colours(rows)
    for row in rows:
        x, y = _point(axes, row, colours[row.cell.name], unit)
        _label(axes, row.cell.column or row.cell.name, x, y, colours[row.cell.name])
    return figure


def _trade_off(rows: list[ReportRow]) -> Figure:
    """A line a schedule, its points labelled with their epochs over the recipe's."""
    figure, axes, unit = _axes(rows)
    lines: dict[str, list[ReportRow]] = defaultdict(list)
    for row in rows:
        lines[row.plan.schedule].append(row)
    for i, (schedule, members) in enumerate(lines.items()):
        colour = COLOURS.get(schedule, OTHERS[0])
        points = sorted(
            (*_point(axes, row, colour, unit), f"{row.plan.epochs / row.plan.base.epochs:.2g}×") for row in members
        )
        axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=colour, label=schedule, linewidth=1.8)
        for x, y, factor in points:
            _label(axes, factor, x, y, colour, above=i % 2 == 1)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure


def _dots(rows: list[ReportRow]) -> Figure:
    """A line a row of the table, or a cell where it has no rows, and on it the accuracy of its cells."""
    lines = list(dict.fromkeys(row.cell.row or row.cell.column or row.cell.name for row in rows))
    figure = Figure(figsize=(7.2, 1.2 + 0.42 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        mean, deviation = row.score(str(row.metric)) or (0.0, 0.0)
        y, colour = (
            lines.index(row.cell.row or row.cell.column or row.cell.name),
            COLOURS.get(row.plan.schedule, OTHERS[0]),
        )
        axes.errorbar([mean], [y], xerr=deviation or None, fmt="o", color=colour, markersize=7, capsize=3)
    for schedule in dict.fromkeys(row.plan.schedule for row in rows):
        axes.plot([], [], "o", color=COLOURS.get(schedule, OTHERS[0]), label=schedule)
    axes.set_yticks(range(len(lines)), [fill(line, 30) for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel(f"{' or '.join(dict.fromkeys(METRICS[str(row.metric)] for row in rows))}, %", color=INK)
    _plain(axes)
    figure.legend(loc="outside upper right", ncols=4, frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _learning(results: Results, rows: list[ReportRow]) -> Figure:
    """Validation over training time, the mean over seeds; a panel for each row of the table."""
    panels: dict[str, list[ReportRow]] = defaultdict(list)
    for row in rows:
        panels[row.cell.row].append(row)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(
        figsize=(7.2 if across == 1 else 3.6 * across, 4.2 if across == 1 else 2.9 * down), layout="constrained"
    )
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, members) in zip(grid.flat, panels.items(), strict=False):
        colours = _colours(members)
        unit, name = _unit(max(row.seconds for row in members))
        for row in members:
            seconds, values = _mean_curve(row)
            if len(values) < 2:
                continue  # no curve: validated at the end alone, or never
            axes.plot(seconds / unit, values, color=colours[row.cell.name], linewidth=1.8, marker="o", markersize=3.5)
            axes.plot([], [], color=colours[row.cell.name], label=row.cell.column or row.cell.name)
        _plain(axes)
        axes.set_title(fill(title, 36), loc="left", fontsize=10, color=INK)
        axes.set_xlabel(f"training time, {name}", color=INK)
        axes.set_ylabel(f"validation {METRICS[str(members[0].metric)]}, %", color=INK)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return figure


def _mean_curve(row: ReportRow) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations of all seeds happen at the same steps; a resumed one may lack some."""
    curves = [outcome.curve for outcome in row.outcomes]
    length = min(len(curve) for curve in curves)
    mean = np.array([curve[:length] for curve in curves]).reshape(len(curves), length, 2).mean(0)
    return mean[:, 0], mean[:, 1]


def _unit(seconds: float) -> tuple[float, str]:
    """In which to count so many seconds: its length in seconds and its name."""
    return next((length, name) for least, length, name in UNITS if seconds >= least)


def _axes(rows: list[ReportRow]) -> tuple[Figure, Axes, float]:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    unit, name = _unit(max(row.seconds for row in rows))
    times = [row.seconds / unit for row in rows]
    near = max(times) < 6 * min(times)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8) if near else (1, 2, 5)))
    axes.set_xlim(min(times) / 1.5, max(times) * 1.5)
    axes.set_xlabel(f"training time, {name} (log scale)", color=INK)
    axes.set_ylabel(f"{METRICS[str(rows[0].metric)]}, %", color=INK)
    _plain(axes)
    return figure, axes, unit


def _point(axes: Axes, row: ReportRow, colour: str, unit: float) -> tuple[float, float]:
    mean, deviation = row.score(str(row.metric)) or (0.0, 0.0)
    bars = deviation if deviation else None
    x = row.seconds / unit
    axes.errorbar([x], [mean], yerr=bars, fmt="o", color=colour, markersize=7, capsize=3, elinewidth=1.2)
    return x, mean


def _label(axes: Axes, text: str, x: float, y: float, colour: str, above: bool = True) -> None:
    """Beside a point, where a rising line through it does not pass."""
    away, side = ((-6, 6), "right") if above else ((7, -13), "left")
    axes.annotate(text, (x, y), away, textcoords="offset points", fontsize=9, color=colour, weight="bold", ha=side)


def _colours(rows: Iterable[ReportRow]) -> dict[str, str]:
    """A colour a cell: a schedule's own for the first that has it."""
    rows, free = list(rows), cycle(OTHERS)
    taken: dict[str, str] = {}
    for row in rows:
        own = COLOURS.get(row.plan.schedule)
        taken[row.cell.name] = own if own and own not in taken.values() else ""
    used = set(taken.values())
    return {name: colour or next(other for other in free if other not in used) for name, colour in taken.items()}


def _plain(axes: Axes) -> None:
    axes.tick_params(colors=INK, which="both", labelsize=9, length=3)
    axes.grid(color=SOFT, linewidth=0.5, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
