"""Tables of a plan: its phases, and the loader throughput that they require."""

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
from .plan import Phase, Plan, Slot
from .schedules import baseline_of


def make_plan_table(
    plan: Plan, gpus: int = 1, clip_cost: ClipCost = clip_pixels, times: list[PhaseTime] | None = None
) -> Table:
    """Return a table with a row per phase: grid, batch, layout on `gpus` GPUs, epochs, steps, LR and share of the cost.

    Columns of a short cycle list crops, clips and clips per GPU in the order of the steps; the first is called "drawn"
    where steps draw their slots. BN `sub k` means k groups on each GPU, `sync k` one group over k GPUs, `plain` one
    group on each GPU. The caption has the totals. The table is about 100 columns wide.
    """
    table = _make_table(
        f"Plan: {plan.schedule}, {plan.dataset_size:,} clips" + (f" on {gpus} GPUs" if gpus > 1 else "")
    )
    has_short_cycle = any(len(phase.slots) > 1 for phase in plan.phases)
    draws = any(phase.weights for phase in plan.phases)
    columns = {"stage": True, "phase": True, "grid": True, "short cycle": has_short_cycle, "clips/step": True}
    columns |= {"per GPU": gpus > 1, "BN": True, "epochs": True, "steps": True, "LR": True, "cost": True}
    columns["time"] = times is not None
    headings = [heading for heading, shown in columns.items() if shown]
    for heading in headings:
        title = "drawn" if draws and heading == "short cycle" else heading
        table.add_column(title, justify="left" if heading in ("LR", "BN") else "right", no_wrap=True)
    plan_cost = total_cost(plan.phases, clip_cost)
    last_phases = {phase.stage: i for i, phase in enumerate(plan.phases)}  # LR stage → index of its last phase
    for i, phase in enumerate(plan.phases):
        start, end = phase.epochs
        new_stage = i == 0 or plan.phases[i - 1].stage != phase.stage
        cells = {
            "stage": f"{phase.stage}" if new_stage else "",
            "phase": f"{i + 1}",
            "grid": f"{phase.grid.frames}×{phase.grid.size}²",
            "short cycle": " ".join(_format_slot(phase, slot) for slot in phase.slots),
            "clips/step": " ".join(str(slot.batch) for slot in phase.slots),
            "per GPU": " ".join(_format_clips_per_gpu(phase, slot, gpus) for slot in phase.slots),
            "BN": _format_bn_layout(phase, gpus),
            "epochs": f"{round(start, 2):g}–{round(end, 2):g}",
            "steps": f"{phase.num_steps:,}",
            "LR": _format_lr(plan, phase),
            "cost": f"{total_cost([phase], clip_cost) / plan_cost:.1%}",
            "time": format_duration(times[i].seconds) if times else "",
        }
        ends_stage = len(last_phases) < len(plan.phases) and last_phases[phase.stage] == i
        table.add_row(*(cells[heading] for heading in headings), end_section=ends_stage)
    table.caption = "\n".join(_totals(plan, clip_cost, times))
    return set_full_width(table)


def _make_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.caption_justify, table.caption_style = "left", ""
    return table


def set_full_width(table: Table) -> Table:
    """Make the table as wide as its content. In a file or pipe, rich assumes 80 columns and would break cells."""
    wide = Console(width=1000)
    table.width = Measurement.get(wide, wide.options, table).maximum
    return table


def _format_slot(phase: Phase, slot: Slot) -> str:
    """Return the slot's crop, with its frames if those differ from the phase's."""
    return f"{slot.grid.size}" if slot.grid.frames == phase.grid.frames else f"{slot.grid.frames}×{slot.grid.size}"


def _format_clips_per_gpu(phase: Phase, slot: Slot, gpus: int) -> str:
    smallest, largest = clips_per_gpu(phase, slot, gpus)
    return f"{largest}" if smallest == largest else f"{smallest}–{largest}"


def _format_bn_layout(phase: Phase, gpus: int) -> str:
    kind, count = bn_layout(phase, gpus)
    return kind if kind == "plain" else f"{kind} {count}"


def _format_lr(plan: Plan, phase: Phase) -> str:
    first, last = (f"{plan.lr(step):.3g}" for step in (phase.steps[0], phase.steps[1] - 1))
    return first if first == last else f"{first}→{last}"


def _totals(plan: Plan, clip_cost: ClipCost, times: list[PhaseTime] | None) -> Iterator[str]:
    """Yield lines with the totals of the plan and of the same recipe's baseline, and the saving."""
    baseline = baseline_of(plan)
    for p in (plan, baseline) if plan.schedule != baseline.schedule else (plan,):
        clips = p.clips_before(p.steps)
        yield f"{p.schedule}: {p.epochs:g} epochs, {p.steps:,} steps, {clips:,} clips to decode"
    if plan.schedule != baseline.schedule:
        cost_saving = total_cost(baseline.phases, clip_cost) / total_cost(plan.phases, clip_cost)
        unit = "pixels" if clip_cost is clip_pixels else "FLOPs"
        yield f"saving: {baseline.steps / plan.steps:.2f}× fewer steps, {cost_saving:.2f}× fewer {unit}"
    if times:
        yield f"predicted training time: {format_duration(sum(time.seconds for time in times))}"


def make_loader_demand_table(plan: Plan, gpus: int, benchmark: Benchmark) -> Table:
    """Return a table with a row per grid: the throughput that keeps the GPUs busy at the benchmark's step times.

    If the benchmark has loader rates, the last columns are the rate of the loader and the share of the time that GPUs
    wait for it. Pixels are those of the cropped clips that the GPU receives.
    """
    table = _make_table("Required loader throughput")
    loader_measured = bool(benchmark.clips_per_second)
    headings = ["grid", "phases", "step time", "clips/s", "clips/s per GPU", "Mpixels/s", "time"]
    for heading in headings + (["loaded per GPU", "waits"] if loader_measured else []):
        table.add_column(heading, justify="left" if heading == "phases" else "right", no_wrap=True)
    times = predict_phase_times(plan, gpus, benchmark)
    for indices in group_phases_by_slots(plan):
        phases = [plan.phases[i] for i in indices]
        compute_s = sum(times[i].compute_s for i in indices)
        clips = sum(phase.clips() for phase in phases)
        cells = [f"{phases[0].grid.frames}×{phases[0].grid.size}²", ", ".join(str(i + 1) for i in indices)]
        cells += [f"{compute_s / sum(phase.num_steps for phase in phases):.3g} s", f"{clips / compute_s:,.0f}"]
        cells += [f"{clips / compute_s / gpus:,.1f}", f"{total_cost(phases) / compute_s / 1e6:,.0f}"]
        cells += [format_duration(sum(times[i].seconds for i in indices))]
        if loader_measured:
            loading_s = sum(times[i].loading_s for i in indices)
            cells += [f"{clips / gpus / loading_s:,.1f}", f"{times[indices[0]].wait_fraction:.0%}"]
        table.add_row(*cells)
    return set_full_width(table)
