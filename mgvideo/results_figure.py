"""A table's figures: accuracy over training time, and what each run had learnt by when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .monitor import duration
from .plan_figure import INK
from .results import METRICS, Results, Row

SOFT = "#b0b0b0"
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
    if any(len(outcome.curve) > 1 for row in rows for outcome in row.outcomes):
        drawn.append(_save(_learning(results, rows), folder, "learning"))
    return drawn


def _save(figure: Figure, folder: Path, name: str) -> str:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", format="svg", transparent=True, metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", format="png", dpi=150, facecolor="white")
    return name


def _over_time(rows: list[Row]) -> Figure:
    """A point a cell."""
    figure, axes = _axes(rows)
    colours = _colours(rows)
    for row in rows:
        x, y = _point(axes, row, colours[row.cell.name])
        _label(axes, row.cell.column or row.cell.name, x, y, colours[row.cell.name])
    return figure


def _trade_off(rows: list[Row]) -> Figure:
    """A line a schedule, its points labelled with their epochs over the recipe's."""
    figure, axes = _axes(rows)
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[row.plan.schedule].append(row)
    for schedule, members in lines.items():
        colour = COLOURS.get(schedule, OTHERS[0])
        points = sorted(
            (*_point(axes, row, colour), f"{row.plan.epochs / row.plan.base.epochs:.2g}×") for row in members
        )
        axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=colour, label=schedule, linewidth=1.8)
        for x, y, factor in points:
            _label(axes, factor, x, y, colour)
    axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return figure


def _learning(results: Results, rows: list[Row]) -> Figure:
    """Validation over training time, the mean over seeds; a panel for each row of the table."""
    panels: dict[str, list[Row]] = defaultdict(list)
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
        for row in members:
            seconds, values = _mean_curve(row)
            axes.plot(seconds, values, color=colours[row.cell.name], linewidth=1.8, marker="o", markersize=3.5)
            axes.plot([], [], color=colours[row.cell.name], label=row.cell.column or row.cell.name)
        _plain(axes, members)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
        axes.xaxis.get_major_locator().set_params(nbins=4)  # type: ignore[attr-defined]
        axes.set_ylabel(f"validation {METRICS[str(members[0].metric)]}, %", color=INK)
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="lower right")
    return figure


def _mean_curve(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations of all seeds happen at the same steps; a resumed one may lack some."""
    curves = [outcome.curve for outcome in row.outcomes]
    length = min(len(curve) for curve in curves)
    mean = np.array([curve[:length] for curve in curves]).reshape(len(curves), length, 2).mean(0)
    return mean[:, 0], mean[:, 1]


def _axes(rows: list[Row]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    seconds = [row.seconds for row in rows]
    axes.set_xlim(min(seconds) / 1.35, max(seconds) * 1.5)
    axes.set_xlabel("training time, log scale", color=INK)
    axes.set_ylabel(f"{METRICS[str(rows[0].metric)]}, %", color=INK)
    _plain(axes, rows)
    return figure, axes


def _point(axes: Axes, row: Row, colour: str) -> tuple[float, float]:
    mean, deviation = row.score(str(row.metric)) or (0.0, 0.0)
    bars = deviation if deviation else None
    axes.errorbar([row.seconds], [mean], yerr=bars, fmt="o", color=colour, markersize=7, capsize=3, elinewidth=1.2)
    return row.seconds, mean


def _label(axes: Axes, text: str, x: float, y: float, colour: str) -> None:
    axes.annotate(text, (x, y), xytext=(7, 6), textcoords="offset points", fontsize=9, color=colour, weight="bold")


def _colours(rows: Iterable[Row]) -> dict[str, str]:
    """A colour a cell: a schedule's own for the first that has it."""
    rows, free = list(rows), cycle(OTHERS)
    taken: dict[str, str] = {}
    for row in rows:
        own = COLOURS.get(row.plan.schedule)
        taken[row.cell.name] = own if own and own not in taken.values() else ""
    used = set(taken.values())
    return {name: colour or next(other for other in free if other not in used) for name, colour in taken.items()}


def _plain(axes: Axes, rows: list[Row]) -> None:
    axes.tick_params(colors=INK, which="both", labelsize=9, length=3)
    axes.grid(color=SOFT, linewidth=0.5, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
