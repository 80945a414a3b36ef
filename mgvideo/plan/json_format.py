"""Convert a plan to JSON for other programs. Keys follow the published schedules of the reference implementation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from .forecast import ClipCost, PhaseTime, bn_layout, clip_pixels, clips_per_gpu, total_cost
from .plan import Phase, Plan
from .schedules import baseline_of


def plan_to_json(
    plan: Plan,
    gpus: int = 1,
    at: Sequence[float] = (),
    clip_cost: ClipCost = clip_pixels,
    times: Sequence[PhaseTime] | None = None,
) -> dict[str, Any]:
    """Return epochs, LRs, phases and totals of a plan as plain data.

    Phases that differ only in the LR, such as the halves of fine-tuning, are one entry of `phases`. `lr_milestones`
    and `relative_lrs` list them separately.

    Args:
        plan: the plan.
        gpus: number of GPUs; sets clips per GPU and the layout of BN groups.
        at: epochs whose LRs are listed in `lr_at_epoch`.
        clip_cost: cost of a clip by grid, pixels or FLOPs.
        times: the predicted time of each phase. If given, the result includes `seconds`, and each phase also its rates
            and the fraction of time that it waits for data.
    """
    baseline = baseline_of(plan)
    plan_cost = total_cost(plan.phases, clip_cost)
    entries = []
    seconds = dict(zip(plan.phases, times, strict=True)) if times else {}
    for _, group in groupby(plan.phases, key=lambda phase: (phase.stage, phase.slots, phase.trains)):
        phases = list(group)
        entry = _phase_entry(phases, gpus) | {"cost_share": total_cost(phases, clip_cost) / plan_cost}
        if times:
            entry["seconds"] = sum(seconds[phase].seconds for phase in phases)
            compute_s = sum(seconds[phase].compute_s for phase in phases)
            entry["clips_per_second"] = sum(phase.clips() for phase in phases) / compute_s
            entry["pixels_per_second"] = total_cost(phases) / compute_s
            entry["waiting"] = 1 - compute_s / entry["seconds"]
        entries.append(entry)
    return {
        "schedule": plan.schedule,
        "gpus": gpus,
        "dataset_size": plan.dataset_size,
        "max_epoch": plan.epochs,
        "steps": plan.steps,
        "clips": plan.clips_before(plan.steps),
        "lr_milestones": [phase.epochs[0] for phase in plan.phases],
        "relative_lrs": [phase.lr_factor for phase in plan.phases],
        "phases": entries,
        "lr_at_epoch": [[epoch, plan.lr_at(epoch)] for epoch in at],
        "baseline": {"max_epoch": baseline.epochs, "steps": baseline.steps},
        "saving": {
            "steps": baseline.steps / plan.steps,
            "pixels" if clip_cost is clip_pixels else "flops": total_cost(baseline.phases, clip_cost) / plan_cost,
        },
        "notes": list(plan.notes),
    } | ({"seconds": sum(time.seconds for time in times)} if times else {})


def _phase_entry(phases: list[Phase], gpus: int) -> dict[str, Any]:
    """Return the JSON entry of consecutive phases that differ only in the LR."""
    first, last = phases[0], phases[-1]
    bn_kind, bn_count = bn_layout(first, gpus)
    return {
        "lr_stage": first.stage,
        "frames": first.grid.frames,
        "crop": first.grid.size,
        "batch_multiplier": first.multiplier,
        "global_batch": first.batch,
        "epoch_start": first.epochs[0],
        "epoch_end": last.epochs[1],
        "steps": last.steps[1] - first.steps[0],
        "temporal_stride_range": list(first.grid.strides),
        "short_cycle": [
            {
                "crop": slot.grid.size,
                "batch": slot.batch,
                "per_gpu_batch": clips_per_gpu(first, slot, gpus)[1],
                "short_side_range": list(slot.grid.scales),
            }
            | _unusual_values(first, i)
            for i, slot in enumerate(first.slots)
        ],
        "bn": bn_kind,
        "bn_groups": bn_count,
    } | ({} if first.trains == "all" else {"trains": first.trains})


def _unusual_values(phase: Phase, index: int) -> dict[str, Any]:
    """Return those values of a slot that most schedules leave at their default."""
    slot = phase.slots[index]
    values: dict[str, Any] = {} if slot.grid.frames == phase.grid.frames else {"frames": slot.grid.frames}
    values |= {} if slot.strength == 1 else {"strength": slot.strength}
    return values | ({"weight": phase.weights[index]} if phase.weights else {})
