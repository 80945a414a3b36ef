"""`mgvideo plan recommend=true`: all schedules for a recipe and a budget, and which of them the evidence favours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from rich import box
from rich.table import Table

from mgvideo.errors import UserError
from mgvideo.plan.coarse_to_fine import cooldown, monotone, random
from mgvideo.plan.forecast import Benchmark, predict_phase_times, total_cost
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.options import ScheduleOptions
from mgvideo.plan.plan import Base, Grid, Plan
from mgvideo.plan.schedules import baseline, long, multigrid, short
from mgvideo.plan.table import set_full_width

SCHEDULES: tuple[Callable[..., Plan], ...] = (baseline, short, long, multigrid, monotone, cooldown, random)
RECIPE_KEYS = ("jitter", "round_epochs", "random_stride", "bn_group", "min_size")  # that all schedules share
STRENGTHS = ("none", "toy scale", "published")  # from weak to strong


@dataclass(frozen=True)
class Evidence:
    """What is known of a schedule's accuracy at a given cost, and how much that says."""

    strength: str  # one of STRENGTHS
    share: float | None  # of the baseline's compute, with which it reached the baseline's accuracy; None: not seen
    text: str


EVIDENCE = {
    "baseline": Evidence("published", 1.0, "what the others are compared with"),
    "short": Evidence("toy scale", 0.66, "Motion, one seed: the baseline's accuracy with 0.66 of its compute"),
    "long": Evidence("toy scale", 0.44, "Motion, one seed: the baseline's accuracy with 0.44 of its compute"),
    "multigrid": Evidence(
        "published", 0.29, "the paper and its model zoo, Kinetics-400: level with 0.29 of the compute"
    ),
    "monotone": Evidence(
        "toy scale", 0.34, "small networks: the baseline's accuracy with 0.34 of its compute on Motion, not on Camera"
    ),
    "cooldown": Evidence(
        "toy scale",
        0.26,
        "small networks: the baseline's accuracy with 0.26 of its compute on Motion and Camera, 0.30 with MViTv2",
    ),
    "random": Evidence("none", None, "not measured yet; for a network that is tested at many grids"),
}


@dataclass(frozen=True)
class Candidate:
    """A schedule with its plan for the recipe and the budget, or the reason why it has none."""

    name: str
    plan: Plan | None
    problem: str = ""


def candidates(base: Base, dataset_size: int, options: ScheduleOptions, keys: Mapping[str, Any]) -> list[Candidate]:
    """Return every schedule with its plan. They take `RECIPE_KEYS` from `keys`; only the baseline never rounds."""
    found = []
    for function in SCHEDULES:
        accepted = signature(function).parameters.keys() - ({"round_epochs"} if function is baseline else set())
        shared = {key: keys[key] for key in RECIPE_KEYS if key in keys and key in accepted}
        try:
            found.append(Candidate(function.__name__, options.apply(partial(function, **shared))(base, dataset_size)))
        except UserError as error:
            found.append(Candidate(function.__name__, None, str(error)))
    return found


def make_candidate_table(
    found: list[Candidate], clip_cost: Callable[[Grid], float], gpus: int, benchmark: Benchmark | None
) -> Table:
    """Return a table with a row per schedule: epochs, steps, cost relative to the baseline's, and predicted time."""
    table = Table(title="Schedules for this recipe", title_justify="left", title_style="bold", box=box.SIMPLE)
    for heading in ("schedule", "epochs", "steps", "FLOPs", *(["time"] if benchmark else []), "evidence"):
        table.add_column(heading, justify="left" if heading in ("schedule", "evidence") else "right", no_wrap=True)
    for candidate in found:
        evidence = EVIDENCE[candidate.name]
        cells = ["–"] * 3 + (["–"] if benchmark else [])
        if candidate.plan:
            plan = candidate.plan
            whole = total_cost(baseline(plan.base, plan.dataset_size, min_size=1).phases, clip_cost)
            cells[:3] = [f"{plan.epochs:.4g}", f"{plan.steps:,}", f"{total_cost(plan.phases, clip_cost) / whole:.2f}"]
            if benchmark:
                cells[3] = _predicted_time(plan, gpus, benchmark)
        table.add_row(candidate.name, *cells, f"{evidence.strength}: {evidence.text}")
    table.caption = "FLOPs are relative to those of the whole baseline" + (
        "; time is that of training, as predicted from the benchmark" if benchmark else ""
    )
    table.caption_justify, table.caption_style = "left", ""
    return set_full_width(table)


def _predicted_time(plan: Plan, gpus: int, benchmark: Benchmark) -> str:
    try:
        return format_duration(sum(time.seconds for time in predict_phase_times(plan, gpus, benchmark)))
    except UserError:  # the benchmark lacks a grid
        return "not measured"


def advice(found: list[Candidate]) -> Iterator[str]:
    """Yield lines on the schedules that the evidence favours, and on those that are not measured or do not fit.

    Strong evidence comes first; weaker evidence is named only where it favours a schedule with less compute.
    """
    others = [candidate.name for candidate in found if candidate.plan and candidate.name != "baseline"]
    shares = {name: EVIDENCE[name].share or math.inf for name in others}
    least = math.inf
    for strength in reversed(STRENGTHS):
        known = [name for name in others if EVIDENCE[name].strength == strength and shares[name] < least]
        if known:
            best = min(known, key=shares.__getitem__)
            least = shares[best]
            yield f"{strength} evidence favours {best}: {EVIDENCE[best].text}"
    unknown = [name for name in others if EVIDENCE[name].strength == "none"]
    if unknown:
        yield f"{', '.join(unknown)} may be better: not measured yet"
    for candidate in found:
        if candidate.problem:
            yield f"{candidate.name} does not fit: {candidate.problem}"
