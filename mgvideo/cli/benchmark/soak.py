"""`mgvideo benchmark soak`: check that memory and open files of the loader workers stay flat over many clips."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import active_children
from statistics import mean

import psutil
from omegaconf import DictConfig

from mgvideo.cli import keys
from mgvideo.cli.build import build_data, build_plan, loader_options
from mgvideo.cli.schema import key
from mgvideo.loading.loader import Loader
from mgvideo.loading.requests import BatchRequest
from mgvideo.plan.formatting import format_duration
from mgvideo.plan.plan import Grid, require
from mgvideo.storage.paths import explain_write_errors

from .loader import random_requests

MAX_EXTRA_FILES = 2  # the number of open files varies by this much without a leak


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    clips: int = key(20_000, "clips to load with the same workers, of all grids of the plan in turn", least=1)
    every: int = key(50, "clips between two measurements of the workers; about twenty are printed", least=1)
    batch: int = key(4, "clips per batch", least=1)
    growth: float = key(
        0.05, "share by which memory may grow from the second quarter to the last; more is exit code 1", least=0
    )
    out: str | None = key(None, "JSON file for the measurements; null: none")


@dataclass(frozen=True)
class WorkerUsage:
    """Maximum over the workers of private memory (MiB) and open files, after `clips` clips and `seconds`."""

    clips: int
    failures: int
    seconds: float
    memory: float
    files: int

    def __str__(self) -> str:
        return (
            f"{self.clips} clips, {self.failures} bad videos, {self.seconds:.0f} s: a worker uses at most "
            f"{self.memory:.1f} MiB of private memory and {self.files} open files"
        )


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(Keys, overrides)
    require(
        options.clips >= 8 * options.every, f"every={options.every}: give at most an eighth of clips={options.clips}"
    )
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Load the clips, print usages and the verdict. Exits with 1 if memory or open files grow."""
    data = build_data(cfg)
    plan = build_plan(cfg, len(data.train))
    grids = sorted({slot.grid.name: slot.grid for phase in plan.phases for slot in phase.slots}.items())
    requests = partial(mixed_requests, [grid for _, grid in grids], len(data.train), options.batch)
    usages: list[WorkerUsage] = []
    print_every = max(1, options.clips // options.every // 20)
    for usage in soak(Loader(data.train, loader_options(cfg)), requests, options):
        usages.append(usage)
        if len(usages) % print_every == 0:
            left = usage.seconds / usage.clips * max(0, options.clips - usage.clips)
            print(f"{usage}; {format_duration(left)} left", flush=True)
            write_usages(options.out, usages)
    write_usages(options.out, usages)
    memory, files = usage_growth(usages)
    flat = memory <= options.growth and files <= MAX_EXTRA_FILES
    print(f"from the second quarter to the last: memory {memory:+.1%}, open files {files:+.1f}: {_word(flat)}")
    if not flat:
        raise SystemExit(1)


def write_usages(out: str | None, usages: Sequence[WorkerUsage]) -> None:
    """Write the measurements so far to the JSON file, if there is one."""
    if out is not None:
        with explain_write_errors("out", out), open(out, "w", encoding="utf-8") as file:
            json.dump([asdict(usage) for usage in usages], file, indent=1)


def _word(flat: bool) -> str:
    return "flat" if flat else "growing"


def mixed_requests(grids: Sequence[Grid], videos: int, batch: int, step: int) -> BatchRequest:
    """Return a request for clips of random videos; steps take the grids in turn."""
    return random_requests(grids[step % len(grids)], videos, batch, step)


def soak(loader: Loader, requests: Callable[[int], BatchRequest], options: Keys) -> Iterator[WorkerUsage]:
    """Load the clips with one set of workers, and yield their usage every `options.every` clips."""
    clips = failures = 0
    start, other_pids = time.monotonic(), {child.pid for child in active_children()}
    batches = loader.load_steps(requests, range(-(-options.clips // options.batch)))
    pids = [child.pid for child in active_children() if child.pid not in other_pids]
    processes = [psutil.Process(pid) for pid in pids] or [psutil.Process()]  # without workers, this process loads
    for batch in batches:
        intervals = clips // options.every
        clips += len(batch.clips)
        failures += len(batch.failures)
        if clips // options.every > intervals:
            with suppress(psutil.Error):  # workers exit once the last batches are loaded
                memory = max(map(private_memory_mib, processes))
                files = max(process.num_fds() for process in processes)
                yield WorkerUsage(clips, failures, time.monotonic() - start, memory, files)


def private_memory_mib(process: psutil.Process) -> float:
    """Return the private memory of a process in MiB.

    Shared memory is left out: it holds batches, whose size depends on the current grid.
    """
    maps = [region for region in process.memory_maps() if not region.path.startswith("/dev/shm/")]
    return sum(region.private_clean + region.private_dirty for region in maps) / 2**20


def usage_growth(usages: Sequence[WorkerUsage]) -> tuple[float, float]:
    """Return relative growth of memory and growth of open files, from the second quarter of the usages to the last."""
    quarter = len(usages) // 4
    early, late = usages[quarter : 2 * quarter], usages[-quarter:]
    memory = mean(usage.memory for usage in late) / mean(usage.memory for usage in early) - 1
    return memory, mean(usage.files for usage in late) - mean(usage.files for usage in early)
