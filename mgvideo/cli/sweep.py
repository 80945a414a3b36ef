"""The table at the end of a sweep (`--multirun`): the main metric of each run, and its mean over seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from mgvideo.plan.formatting import format_duration
from mgvideo.plan.table import set_full_width


@dataclass(frozen=True)
class SweptRun:
    """A run of a sweep."""

    overrides: tuple[str, ...]
    folder: Path
    start: float = field(default_factory=time.time)

    def read_report(self) -> dict[str, Any] | None:
        """Return the contents of report.json if this run has written it, else None."""
        path = self.folder / "report.json"
        if not path.is_file() or path.stat().st_mtime < self.start - 2:  # 2 s: some disks round times
            return None
        return json.loads(path.read_text(encoding="utf-8"))


def print_sweep(runs: Sequence[SweptRun]) -> None:
    """Print a table of the runs, unless none of them has a report."""
    table = sweep_table(runs)
    if table is not None:
        console = Console(soft_wrap=True, highlight=False, markup=False)
        console.print(table if console.is_terminal else set_full_width(table))


def sweep_table(runs: Sequence[SweptRun]) -> Table | None:
    """Return a table with a row for each run, then one for each group of runs that differ only in their seed."""
    reports = [run.read_report() for run in runs]
    metric = next((next(iter(report["metrics"])) for report in reports if report), None)
    if metric is None or len(runs) < 2:
        return None
    table = Table(box=None, pad_edge=False, title=f"{len(runs)} runs", title_justify="left")
    for heading in ("run", f"{metric}, %", "training"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    shared = set.intersection(*(set(run.overrides) for run in runs))
    groups: dict[str, list[float]] = {}
    for run, report in zip(runs, reports, strict=True):
        swept = [override for override in run.overrides if override not in shared]
        if report is None:
            table.add_row(" ".join(swept), "failed", "")
            continue
        value = report["metrics"].get(metric, float("nan"))
        table.add_row(" ".join(swept), f"{value:.2f}", format_duration(report["train_seconds"]))
        groups.setdefault(" ".join(o for o in swept if not o.startswith("seed=")), []).append(value)
    for name, values in groups.items():
        if len(values) > 1:
            label = f"{name}: mean of {len(values)}".removeprefix(": ")
            table.add_row(f"{label} ± standard deviation", f"{mean(values):.2f} ± {stdev(values):.2f}", "")
    return table
