"""A plan as JSON for other programs, in the words of the reference's published schedules."""

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
    """Epochs, LRs (also at the epochs `at`), phases and totals.

    Phases that differ in LR alone, such as the halves of fine-tuning, are one entry of `phases`: the milestones and
    relative LRs tell them apart.
    """
    baseline = baseline_of(plan)
    whole = total_cost(plan.phases, clip_cost)
    entries = []
    seconds = dict(zip(plan.phases, times, strict=True)) if times else {}
    for _, same in groupby(plan.phases, key=lambda phase: (phase.stage, phase.slots)):
        phases = list(same)
        entry = _entry(phases, gpus) | {"cost_share": total_cost(phases, clip_cost) / whole}
        if times:
            entry["seconds"] = sum(seconds[phase].seconds for phase in phases)
            compute = sum(seconds[phase].compute_s for phase in phases)
            entry["clips_per_second"] = sum(phase.clips() for phase in phases) / compute
            entry["pixels_per_second"] = total_cost(phases) / compute
            entry["waiting"] = 1 - compute / entry["seconds"]
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
            "pixels" if clip_cost is clip_pixels else "flops": total_cost(baseline.phases, clip_cost) / whole,
        },
        "notes": list(plan.notes),
    } | ({"seconds": sum(time.seconds for time in times)} if times else {})


def _entry(phases: list[Phase], gpus: int) -> dict[str, Any]:
    first, last = phases[0], phases[-1]
    kind, groups = bn_layout(first, gpus)
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
            for slot in first.slots
        ],
        "bn": kind,
        "bn_groups": groups,
    }
