"""Print the cost of a table's cells as planned; requires neither the dataset nor a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from mgvideo.errors import UserError
from mgvideo.plan.forecast import Benchmark, predict_phase_times
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.schedules import baseline_of
from mgvideo.reproduce.tables import ResultTable

from .tables import TableEntry


def print_costs(
    table: ResultTable, entries: Sequence[TableEntry], seeds: int, benchmark: Benchmark | None, gpus: Mapping[str, int]
) -> None:
    """Print the epochs, steps and FLOPs of a table's cells and, with a benchmark, their times; `gpus` is by cell."""
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
    trained: list[TableEntry] = []
    for entry in entries:
        figures = ["–"] * 5
        if entry.cell.not_run is None and entry.config.train.enable:
            trained.append(entry)
            plan, cell_flops = entry.plan, entry.flops(entry.plan)
            steps, flops = steps + plan.steps, flops + cell_flops
            steps_saved = baseline_of(plan).steps / plan.steps
            figures = [f"{plan.epochs:g}", f"{plan.steps:,}", format_flops(cell_flops), f"{steps_saved:.2f}×", "–"]
            with suppress(UserError):  # the benchmark lacks a grid of this cell
                times = predict_phase_times(plan, gpus[entry.cell.name], benchmark) if benchmark else []
                cell_seconds = sum(phase.seconds for phase in times)
                seconds, figures[-1] = seconds + cell_seconds, format_duration(cell_seconds) if benchmark else "–"
        grid.add_row(entry.cell.name, entry.cell.title, *figures)
    console.print(grid)
    for reason in dict.fromkeys(entry.skip_reason for entry in entries if entry.skip_reason):
        names = ", ".join(entry.cell.name for entry in entries if entry.skip_reason == reason)
        console.print(f"  {names}: {reason}", soft_wrap=True)
    for note in dict.fromkeys(note for entry in trained for note in entry.train_videos[1]):
        console.print(f"  {note}", soft_wrap=True)
    if steps:
        total = f"{seeds * steps:,.0f} steps, {format_flops(seeds * flops)} multiply-adds of forward passes"
        console.print(
            f"  × {seeds} seed{'s' * (seeds > 1)}: {total}{f', {format_duration(seeds * seconds)}' * bool(seconds)}"
        )


def format_flops(flops: float) -> str:
    """Format FLOPs with a prefix (T, P or E), as in `3.2 P`."""
    size, prefix = next((size, prefix) for size, prefix in ((1e18, "E"), (1e15, "P"), (0, "T")) if flops >= size)
    return f"{flops / (size or 1e12):.3g} {prefix}"
