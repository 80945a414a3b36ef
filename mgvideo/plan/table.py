"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .forecast import (
    Benchmark,
    ClipCost,
    PhaseTime,
    bn_layout,
    clip_pixels,
    clips_per_gpu,
    group_phases_by_slots,
    predict_phase_times,
    total_cost,
)
from .formatting import format_duration
from .plan import Phase, Plan
from .schedules import baseline_of


def make_plan_table(
    plan: Plan, gpus: int = 1, clip_cost: ClipCost = clip_pixels, times: list[PhaseTime] | None = None
) -> Table:
    """One row a phase: what is trained on, how it lies on `gpus` GPUs, when, at which LR, for what share of the cost.

    A short cycle's crops, clips and clips per GPU stand in the order in which steps take them. BN `sub k` is k groups
    on each GPU, `sync k` one group over k GPUs, `plain` one on each. About 100 columns wide. Totals stand beneath.
    """
    table = _table(f"Plan: {plan.schedule}, {plan.dataset_size:,} clips" + (f" on {gpus} GPUs" if gpus > 1 else ""))
    several = any(len(phase.slots) > 1 for phase in plan.phases)
    columns = {"stage": True, "phase": True, "grid": True, "short cycle": several, "clips a step": True}
    columns |= {"a GPU": gpus > 1, "BN": True, "epochs": True, "steps": True, "LR": True, "cost": True}
    columns["time"] = times is not None
    for heading in (heading for heading, shown in columns.items() if shown):
        table.add_column(heading, justify="left" if heading in ("LR", "BN") else "right", no_wrap=True)
    whole = total_cost(plan.phases, clip_cost)
    stages = {phase.stage: i for i, phase in enumerate(plan.phases)}  # the last phase of each
    for i, phase in enumerate(plan.phases):
        start, end = phase.epochs
        new_stage = i == 0 or plan.phases[i - 1].stage != phase.stage
        cells = {
            "stage": f"{phase.stage}" if new_stage else "",
            "phase": f"{i + 1}",
            "grid": f"{phase.grid.frames}×{phase.grid.size}²",
            "short cycle": " ".join(f"{slot.grid.size}" for slot in phase.slots),
            "clips a step": " ".join(str(slot.batch) for slot in phase.slots),
            "a GPU": " ".join(_share(phase, i, gpus) for i in range(len(phase.slots))),
            "BN": _groups(phase, gpus),
            "epochs": f"{round(start, 2):g}–{round(end, 2):g}",
            "steps": f"{phase.num_steps:,}",
            "LR": _rates(plan, phase),
            "cost": f"{total_cost([phase], clip_cost) / whole:.1%}",
            "time": format_duration(times[i].seconds) if times else "",
        }
        last = len(stages) < len(plan.phases) and stages[phase.stage] == i
        table.add_row(*(cells[heading] for heading, shown in columns.items() if shown), end_section=last)
    table.caption = "\n".join(_totals(plan, clip_cost, times))
    return _as_wide_as_needed(table)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.caption_justify, table.caption_style = "left", ""
    return table


def _as_wide_as_needed(table: Table) -> Table:
    """A log that is no terminal counts as 80 columns wide; cells cut short would be of no use there."""
    wide = Console(width=1000)
    table.width = Measurement.get(wide, wide.options, table).maximum
    return table


def _share(phase: Phase, slot: int, gpus: int) -> str:
    fewest, most = clips_per_gpu(phase, phase.slots[slot], gpus)
    return f"{most}" if fewest == most else f"{fewest}–{most}"


def _groups(phase: Phase, gpus: int) -> str:
    kind, count = bn_layout(phase, gpus)
    return kind if kind == "plain" else f"{kind} {count}"


def _rates(plan: Plan, phase: Phase) -> str:
    first, last = (f"{plan.lr(step):.3g}" for step in (phase.steps[0], phase.steps[1] - 1))
    return first if first == last else f"{first}→{last}"


def _totals(plan: Plan, clip_cost: ClipCost, times: list[PhaseTime] | None) -> Iterator[str]:
    """Lines of what the whole plan takes, beside the same recipe's baseline."""
    baseline = baseline_of(plan)
    for each in (plan, baseline) if plan.schedule != baseline.schedule else (plan,):
        clips = each.clips_before(each.steps)
        yield f"{each.schedule}: {each.epochs:g} epochs, {each.steps:,} steps, {clips:,} clips to decode"
    if plan.schedule != baseline.schedule:
        compute = total_cost(baseline.phases, clip_cost) / total_cost(plan.phases, clip_cost)
        unit = "pixels" if clip_cost is clip_pixels else "FLOPs"
        yield f"saving: {baseline.steps / plan.steps:.2f}× fewer steps, {compute:.2f}× fewer {unit}"
    if times:
        yield f"predicted time of training: {format_duration(sum(time.seconds for time in times))}"


def make_loader_demand_table(plan: Plan, gpus: int, benchmark: Benchmark) -> Table:
    """One row a grid: what its phases ask of the loaders at the benchmark's step times, and whether they wait.

    Pixels are those of clips as the GPU gets them.
    """
    table = _table("What the loaders must deliver")
    measured = bool(benchmark.clips_per_second)
    headings = ["grid", "phases", "a step", "clips/s", "clips/s a GPU", "Mpixels/s", "time"]
    for heading in headings + (["loader gives a GPU", "waits"] if measured else []):
        table.add_column(heading, justify="left" if heading == "phases" else "right", no_wrap=True)
    times = predict_phase_times(plan, gpus, benchmark)
    for indices in group_phases_by_slots(plan):
        phases = [plan.phases[i] for i in indices]
        compute = sum(times[i].compute_s for i in indices)
        clips = sum(phase.clips() for phase in phases)
        cells = [f"{phases[0].grid.frames}×{phases[0].grid.size}²", ", ".join(str(i + 1) for i in indices)]
        cells += [f"{compute / sum(phase.num_steps for phase in phases):.3g} s", f"{clips / compute:,.0f}"]
        cells += [f"{clips / compute / gpus:,.1f}", f"{total_cost(phases) / compute / 1e6:,.0f}"]
        cells += [format_duration(sum(times[i].seconds for i in indices))]
        if measured:
            loading = sum(times[i].loading_s for i in indices)
            cells += [f"{clips / gpus / loading:,.1f}", f"{times[indices[0]].wait_fraction:.0%}"]
        table.add_row(*cells)
    return _as_wide_as_needed(table)
