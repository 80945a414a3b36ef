"""A plan as a table for people."""

from __future__ import annotations

from rich.table import Table

from .plan import Plan


def plan_table(plan: Plan, gpus: int = 1) -> Table:
    """One row a phase."""
    table = Table(title=f"{plan.schedule}: {plan.epochs:g} epochs, {plan.steps:,} steps")
    for heading in ("LR stage", "grid", "clips a step", "BN groups", "epochs", "steps", "LR"):
        table.add_column(heading)
    for phase in plan.phases:
        clips = " ".join(f"{slot.grid.size}²·{slot.batch}" for slot in phase.slots)
        start, end = phase.epochs
        lr = f"{plan.base.lr * phase.lr_factor:g}"
        cells = (
            f"{phase.stage}",
            phase.grid.name,
            clips,
            f"{phase.bn_groups}",
            f"{start:g}–{end:g}",
            f"{phase.length}",
        )
        table.add_row(*cells, lr)
    return table
