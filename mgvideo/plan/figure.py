"""Draw plans: the clip shape over training, as in figure 2 of the paper, and the learning rate below it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .plan import Plan

TITLES = {"short": "Short cycle", "long": "Long cycle", "multigrid": "Long + short cycle"}
TITLES |= {
    "monotone": "Coarse to fine, once",
    "cooldown": "Coarse, then a cooldown",
    "random": "A grid drawn each step",
}
MAX_BARS = 420  # bars drawn over the baseline's whole run; few enough to see the short cycle's single steps
INK, RED, FRAME = "#333333", "#d1495b", "#b0b0b0"


def draw_plans(plans: Sequence[Plan], path: str | Path) -> None:
    """Draw plans of one recipe below each other into the PNG file `path`. The x axis is % of the baseline's steps.

    A bar's height is the crop size, its colour the number of frames. The bars of a short cycle alternate between its
    crops, but not every step has a bar.

    Args:
        plans: the baseline first.
        path: the PNG file to write.
    """
    figure = Figure(figsize=(10, 0.9 + 1.6 * len(plans)), layout="constrained")
    axes = figure.subplots(2 * len(plans), 1, sharex=True, height_ratios=[2.6, 1] * len(plans))
    frames = sorted({slot.grid.frames for plan in plans for phase in plan.phases for slot in phase.slots})
    colours = dict(zip(frames, _make_shades(len(frames)), strict=True))
    lrs = [plan.lr(step) for plan in plans for phase in plan.phases for step in (phase.steps[0], phase.steps[1] - 1)]
    min_lr = max(min(lrs), max(lrs) / 1e5)  # a cosine ends at 0, which a log axis cannot show
    for i, plan in enumerate(plans):
        clip_axes, lr_axes = axes[2 * i], axes[2 * i + 1]
        _draw_clips(clip_axes, plan, plans[0], colours)
        _draw_lr(lr_axes, plan, plans[0])
        lr_axes.set_ylim(min_lr / 2, max(lrs) * 2)
    axes[-1].set_xlabel("steps, % of the baseline's (all steps cost about the same)", color=INK)
    axes[-1].set_xlim(0, 100)
    handles = [Patch(color=colours[count], label=f"{count} frames") for count in frames]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, format="png")


def _make_shades(count: int) -> list[str]:
    """Return `count` hex colours from light to dark blue."""
    light, dark = np.array([0.68, 0.83, 0.92]), np.array([0.05, 0.22, 0.42])
    return [to_hex(light + (dark - light) * i / max(1, count - 1)) for i in range(count)]


def _draw_clips(axes: Axes, plan: Plan, baseline: Plan, colours: dict[int, str]) -> None:
    for phase in plan.phases:
        start, end = (100 * step / baseline.steps for step in phase.steps)
        cycles = max(1, round((end - start) * MAX_BARS / 100 / len(phase.slots)))
        edges = np.linspace(start, end, cycles * len(phase.slots) + 1)
        slots = [phase.slot(phase.steps[0] + i) for i in range(min(len(edges) - 1, phase.num_steps))]
        slots += [slots[i % len(slots)] for i in range(len(edges) - 1 - len(slots))]  # fewer steps than bars
        for frames in dict.fromkeys(slot.grid.frames for slot in slots):
            heights = [slot.grid.size if slot.grid.frames == frames else 0 for slot in slots]
            axes.stairs(heights, edges, fill=True, color=colours[frames], linewidth=0)
        axes.axvline(end, color="white", linewidth=1.2)
    axes.set_title(
        TITLES.get(plan.schedule, plan.schedule.capitalize()), loc="left", fontsize=10, weight="bold", color=INK
    )
    totals = f"{plan.epochs:g} epochs, {plan.steps:,} steps"
    if plan is baseline:
        axes.set_title(totals, loc="right", fontsize=9, color=INK)
    else:
        text_x = 100 * plan.steps / baseline.steps + 1.5
        saving = f"{baseline.steps / plan.steps:.1f}× fewer steps"
        middle = plan.base.crop_size / 2
        axes.text(text_x, middle, saving, fontsize=15, weight="bold", color=RED, va="bottom")
        axes.text(text_x, middle * 0.9, totals, fontsize=9, color=INK, va="top")
    axes.set_ylim(0, plan.base.crop_size * 1.05)
    axes.set_yticks(sorted({slot.grid.size for phase in plan.phases for slot in phase.slots}))
    axes.set_ylabel("crop", color=INK)
    style_axes(axes)


def _draw_lr(axes: Axes, plan: Plan, baseline: Plan) -> None:
    steps = np.concatenate([np.linspace(phase.steps[0], phase.steps[1] - 1, 100).astype(int) for phase in plan.phases])
    axes.plot(100 * steps / baseline.steps, [plan.lr(int(step)) for step in steps], color=RED, linewidth=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_ylabel("LR", color=INK)
    style_axes(axes)


def style_axes(axes: Axes, grid: bool = False) -> None:
    """Apply the style of all figures: dark text, no top and right border, and with `grid` a soft grid."""
    axes.tick_params(colors=INK, which="both", labelsize=8, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FRAME)
    if grid:
        axes.grid(color=FRAME, linewidth=0.5, alpha=0.5)
