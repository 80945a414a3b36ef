"""`mgvideo benchmark`: what the loader, a step and the trainer cost, as ratios within one run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from mgvideo.cli import app, keys
from mgvideo.cpu.resources import cpu_count
from mgvideo.plan.plan import Grid, Plan, require
from mgvideo.storage.paths import explain_write_errors

BENCHMARKS = {
    "loader": "clips a second of the real loader at each grid of a plan, beside the bare library that only decodes",
    "step": "milliseconds of a training step at each grid, by model, precision, memory format and compilation",
    "soak": "whether memory and open files of the loader's workers stay flat over many clips",
    "sampler": "the time in which a rank finds its clips of a step, at several numbers of ranks",
    "ranks": "the first and the last of many ranks through a long cycle, simulated: shards, collectives, host time",
    "gpu": "check and measure everything on one GPU, in one call of under ten minutes",
    "train": "the trainer beside a bare loop, waiting for data, phase boundaries, and multigrid beside the baseline",
}


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo benchmark` and tools/benchmark.py."""
    name, rest = (arguments or ["--help"])[0], list(arguments[1:])
    if name in ("-h", "--help"):
        print("mgvideo benchmark NAME [group=option] [key=value] …\n")
        print("\n".join(f"  {name:<8} {text}" for name, text in BENCHMARKS.items()))
        print("\nEach takes the groups and keys of a run, and its own, which NAME --help explains.")
        return
    with app.exit_on_user_error():
        require(name in BENCHMARKS, f"there is no benchmark of '{name}'; there are: {', '.join(BENCHMARKS)}")
    module = import_module(f"mgvideo.cli.benchmark_{name}")
    own, rest = keys.split(module.Keys, rest)
    with app.exit_on_user_error():
        given = module.read_keys(own)
    intro = f"mgvideo benchmark {name} …: {BENCHMARKS[name]}.\nTakes the groups and keys of a run, and:"
    text = "\n".join([intro, "", *keys.describe(module.Keys)])
    app.main("run", text, partial(module.run, given), rest, keys.names(module.Keys))


def choose_grids(plan: Plan, names: Sequence[str]) -> list[Grid]:
    """The plan's grids, all or those named, from the cheapest to the dearest."""
    grids = {slot.grid.name: slot.grid for phase in plan.phases for slot in phase.slots}
    for name in names:
        require(name in grids, f"grids={name}: the plan has {', '.join(grids)}")
    return sorted((grids[name] for name in names or grids), key=lambda grid: (grid.volume, grid.frames))


def conditions(device: torch.device | None = None) -> dict[str, Any]:
    """What a measurement depends on besides its keys."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    return {
        **gpu,
        "cpus": cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


@contextmanager
def output(path: str | None) -> Iterator[TextIO]:
    """Where a report goes: a file, or the terminal. Raises UserError where the file cannot be written."""
    if path is None:
        yield sys.stdout
        return
    with explain_write_errors("out", path), open(path, "w", encoding="utf-8") as file:
        yield file


def plain_table(title: str, *columns: str) -> Table:
    """An empty table without a frame, its first column a name, the others figures."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def show(file: TextIO, about: dict[str, Any], tables: Sequence[Table]) -> None:
    """Conditions in a line, then the tables."""
    console = Console(file=file, width=160, highlight=False, markup=False)
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()))
    for table in tables:
        console.print(table)
