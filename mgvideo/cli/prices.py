"""What the cells of a table cost, by the planner: needs neither the dataset nor a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from mgvideo.errors import UserError
from mgvideo.plan.forecast import Benchmark, predict_phase_times
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.schedules import baseline_of
from mgvideo.reproduce.tables import ResultTable

from .tables import Entry


def show(table: ResultTable, cells: Sequence[Entry], seeds: int, benchmark: Benchmark | None, gpus: int) -> None:
    """Print a table's cells with their epochs, steps, FLOPs and, from a benchmark, times."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 180
    console.print(f"\n{table.name}, preset={table.preset.name}: {table.title} ({table.mirrors})", style="bold")
    grid = Grid(box=box.SIMPLE)
    for heading in ("cell", "what", "epochs", "steps", "FLOPs", "fewer steps", "time"):
        if heading in ("cell", "what"):
            grid.add_column(heading, overflow="fold")
        else:
            grid.add_column(heading, justify="right", no_wrap=True)
    steps = flops = seconds = 0.0
    priced: list[Entry] = []
    for entry in cells:
        figures = ["–"] * 5
        if entry.cell.not_run is None and entry.config.train.enable:
            priced.append(entry)
            plan, own = entry.plan, entry.flops(entry.plan)
            steps, flops = steps + plan.steps, flops + own
            saved = baseline_of(plan).steps / plan.steps
            figures = [f"{plan.epochs:g}", f"{plan.steps:,}", amount(own), f"{saved:.2f}×", "–"]
            with suppress(UserError):  # the benchmark has not measured this cell's grids
                time = sum(phase.seconds for phase in predict_phase_times(plan, gpus, benchmark)) if benchmark else 0.0
                seconds, figures[-1] = seconds + time, format_duration(time) if benchmark else "–"
        grid.add_row(entry.cell.name, entry.cell.title, *figures)
    console.print(grid)
    for missing in dict.fromkeys(entry.missing for entry in cells if entry.missing):
        names = ", ".join(entry.cell.name for entry in cells if entry.missing == missing)
        console.print(f"  {names}: {missing}", soft_wrap=True)
    for note in dict.fromkeys(note for entry in priced for note in entry.train_videos[1]):
        console.print(f"  {note}", soft_wrap=True)
    if steps:
        total = f"{seeds * steps:,.0f} steps, {amount(seeds * flops)} multiply-adds of forward passes"
        console.print(
            f"  × {seeds} seed{'s' * (seeds > 1)}: {total}{f', {format_duration(seeds * seconds)}' * bool(seconds)}"
        )


def amount(flops: float) -> str:
    """FLOPs as in 3.2 P: tera, peta, exa."""
    size, prefix = next((size, prefix) for size, prefix in ((1e18, "E"), (1e15, "P"), (0, "T")) if flops >= size)
    return f"{flops / (size or 1e12):.3g} {prefix}"
