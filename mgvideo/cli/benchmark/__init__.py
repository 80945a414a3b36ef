"""`mgvideo benchmark`: measure the loader, the training step and the trainer, as ratios within one run."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mgvideo.cli import app, keys
from mgvideo.cpu.resources import cpu_count
from mgvideo.engine.train_step import TrainStep
from mgvideo.engine.trainer import Trainer
from mgvideo.loading.loader import Batch
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Grid, Plan, require
from mgvideo.storage.paths import explain_write_errors

BENCHMARKS = {
    "loader": "clips per second of the loader at each grid of a plan, compared with decoding alone",
    "index": "time to read a clip of short and long recordings, with and without a packet index, warm and cold",
    "step": "milliseconds of a training step at each grid, by model, precision, memory format and compilation",
    "augment": "milliseconds of augmentation on the device at each grid, beside those of a training step",
    "soak": "whether memory and open files of the loader workers stay flat over many clips",
    "sampler": "time in which a rank computes its clips of a step, at several numbers of ranks",
    "scale": "start-up, memory and latency at a list of hundreds of thousands of videos",
    "ranks": "simulate the first and last of many ranks through a long cycle: shards, collectives, host time",
    "gpu": "check and measure everything on one GPU, in under ten minutes",
    "train": "the trainer against a minimal loop, data waiting, phase boundaries, and multigrid against the baseline",
}


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo benchmark` and tools/benchmark.py."""
    name, benchmark_arguments = (arguments or ["--help"])[0], list(arguments[1:])
    if name in ("-h", "--help"):
        print("mgvideo benchmark NAME [group=option] [key=value] …\n")
        print("\n".join(f"  {name:<8} {text}" for name, text in BENCHMARKS.items()))
        print("\nEach takes the groups and keys of a run and its own keys, which NAME --help lists.")
        return
    with app.exit_on_user_error():
        require(name in BENCHMARKS, f"there is no benchmark '{name}'; choose one of {', '.join(BENCHMARKS)}")
    module = import_module(f"mgvideo.cli.benchmark.{name}")
    own_overrides, run_overrides = keys.split(module.Keys, benchmark_arguments)
    with app.exit_on_user_error():
        options = module.read_keys(own_overrides)
    intro = f"mgvideo benchmark {name} …: {BENCHMARKS[name]}.\nTakes the groups and keys of a run, and:"
    text = "\n".join([intro, "", *keys.describe(module.Keys)])
    app.main("run", text, partial(module.run, options), run_overrides, keys.names(module.Keys))


def choose_grids(plan: Plan, names: Sequence[str]) -> list[Grid]:
    """Return the grids of a plan, all or those named, sorted from cheap to expensive."""
    grids = {slot.grid.name: slot.grid for phase in plan.phases for slot in phase.slots}
    for name in names:
        require(name in grids, f"grids={name}: the plan has {', '.join(grids)}")
    return sorted((grids[name] for name in names or grids), key=lambda grid: (grid.volume, grid.frames))


def measurement_conditions(device: torch.device | None = None) -> dict[str, Any]:
    """Return the hardware, load and torch version that a measurement depends on."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    return {
        **gpu,
        "cpus": cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


@contextmanager
def open_report(path: str | None) -> Iterator[TextIO]:
    """Open a file for the report, or stdout for None. Raises UserError if the file cannot be written."""
    if path is None:
        yield sys.stdout
        return
    with explain_write_errors("out", path), open(path, "w", encoding="utf-8") as file:
        yield file


class ResultLog:
    """A context manager; call it with each result of a benchmark to print it with the time left on stderr.

    With `out`, the lines are also appended to `OUT.part`, so that a killed benchmark leaves what it has measured. The
    file is removed once the benchmark has written its report.
    """

    def __init__(self, total: int, out: str | None = None) -> None:
        self.total, self.done, self.out, self.started = total, 0, out, time.monotonic()
        self.part: TextIO | None = None

    def __enter__(self) -> ResultLog:
        if self.out is not None:
            with explain_write_errors("out", self.out):
                self.part = open(f"{self.out}.part", "w", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.part is not None:
            self.part.close()
            if error is None:
                os.remove(self.part.name)

    def __call__(self, result: str) -> None:
        """Print a result, and write it to `OUT.part`."""
        self.done += 1
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        line = f"{self.done} of {self.total}, {format_duration(left)} left: {result}"
        print(line, file=sys.stderr, flush=True)
        if self.part is not None:
            print(line, file=self.part)


def plain_table(title: str, *columns: str) -> Table:
    """Return an empty table without borders: the first column left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def print_report(file: TextIO, conditions: dict[str, Any], tables: Sequence[Table]) -> None:
    """Print the measurement conditions in one line, then the tables."""
    console = Console(file=file, width=160, highlight=False, markup=False)
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in conditions.items()))
    for table in tables:
        console.print(table)


class _ReplacedStep:
    """A training step with another function in place of its call."""

    def __init__(self, train_step: TrainStep, call: Callable[[int, Batch], Tensor]) -> None:
        self._train_step, self._call = train_step, call

    def __call__(self, step: int, batch: Batch) -> Tensor:
        return self._call(step, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._train_step, name)


@contextmanager
def steps_replaced(trainer: Trainer, call: Callable[[int, Batch], Tensor]) -> Iterator[None]:
    """Let the trainer call `call(step, batch)` in place of its training step, inside a `with` block."""
    original = trainer.train_step
    trainer.train_step = _ReplacedStep(original, call)  # type: ignore[assignment]
    try:
        yield
    finally:
        trainer.train_step = original
