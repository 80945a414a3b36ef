"""`mgvideo benchmark soak`: whether memory and open files of the loader's workers stay flat over many clips."""

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
from mgvideo.errors import UserError
from mgvideo.loading.loader import Loader
from mgvideo.loading.requests import BatchRequest
from mgvideo.plan.plan import Grid, require

from .loader import random_requests

FILES = 2  # so many more open files may be chance


@dataclass
class Keys:
    """What this program takes besides the keys of a run."""

    clips: int = key(20_000, "clips to load, of all grids of the plan in turn, by the same workers")
    every: int = key(50, "clips between two looks at the workers; twenty are printed")
    batch: int = key(4, "clips a batch")
    growth: float = key(
        0.05, "share by which memory may grow from the second quarter to the last; over it, exit code 1"
    )
    out: str | None = key(None, "JSON file for the looks; null: none")


@dataclass(frozen=True)
class Look:
    """The loader's processes after so many clips: the most memory of its own (MiB) and open files that one has."""

    clips: int
    failures: int
    seconds: float
    memory: float
    files: int

    def __str__(self) -> str:
        return (
            f"{self.clips} clips, {self.failures} bad videos met, {self.seconds:.0f} s: a worker holds at most "
            f"{self.memory:.1f} MiB of its own and {self.files} open files"
        )


def read_keys(overrides: Sequence[str]) -> Keys:
    """This program's own keys. Raises UserError where a value is of no use."""
    given = keys.read(Keys, overrides)
    for name in ("clips", "every", "batch"):
        require(getattr(given, name) >= 1, f"{name}={getattr(given, name)}: give a whole number from 1 up")
    require(given.clips >= 8 * given.every, f"every={given.every}: give at most an eighth of clips={given.clips}")
    require(given.growth >= 0, f"growth={given.growth}: give 0 or more")
    return given


def run(given: Keys, cfg: DictConfig) -> None:
    """Soak, print each look and the verdict; exits with 1 where memory or open files grow."""
    data = build_data(cfg)
    plan = build_plan(cfg, len(data.train))
    grids = sorted({slot.grid.name: slot.grid for phase in plan.phases for slot in phase.slots}.items())
    requests = partial(mixed_requests, [grid for _, grid in grids], len(data.train), given.batch)
    looks: list[Look] = []
    between = max(1, given.clips // given.every // 20)
    for look in soak(Loader(data.train, loader_options(cfg)), requests, given):
        looks.append(look)
        if len(looks) % between == 0:
            print(look, flush=True)
    if given.out is not None:
        try:
            with open(given.out, "w", encoding="utf-8") as file:
                json.dump([asdict(look) for look in looks], file, indent=1)
        except OSError as error:
            raise UserError(f"cannot write out={given.out}: {error.strerror}") from error
    memory, files = grown(looks)
    flat = memory <= given.growth and files <= FILES
    print(f"from the second quarter to the last: memory {memory:+.1%}, open files {files:+.1f}: {_word(flat)}")
    if not flat:
        raise SystemExit(1)


def _word(flat: bool) -> str:
    return "flat" if flat else "growing"


def mixed_requests(grids: Sequence[Grid], videos: int, batch: int, step: int) -> BatchRequest:
    """Request clips of random videos, at the grids in turn."""
    return random_requests(grids[step % len(grids)], videos, batch, step)


def soak(loader: Loader, requests: Callable[[int], BatchRequest], given: Keys) -> Iterator[Look]:
    """Load the clips with one set of workers; a look every so many clips."""
    clips = failures = 0
    start, before = time.monotonic(), {child.pid for child in active_children()}
    batches = loader.load_steps(requests, range(-(-given.clips // given.batch)))
    pids = [child.pid for child in active_children() if child.pid not in before]
    processes = [psutil.Process(pid) for pid in pids] or [psutil.Process()]  # without workers, this one
    for batch in batches:
        told = clips // given.every
        clips += len(batch.clips)
        failures += len(batch.failures)
        if clips // given.every > told:
            with suppress(psutil.Error):  # workers leave when the last batches are made
                memory = max(map(own_memory, processes))
                files = max(process.num_fds() for process in processes)
                yield Look(clips, failures, time.monotonic() - start, memory, files)


def own_memory(process: psutil.Process) -> float:
    """MiB that only this process holds, without shared memory: batches that it is making, at the grid it is at."""
    maps = [found for found in process.memory_maps() if not found.path.startswith("/dev/shm/")]
    return sum(found.private_clean + found.private_dirty for found in maps) / 2**20


def grown(looks: Sequence[Look]) -> tuple[float, float]:
    """From the second quarter of the looks to the last: the share by which memory grew, and files more."""
    quarter = len(looks) // 4
    early, late = looks[quarter : 2 * quarter], looks[-quarter:]
    memory = mean(look.memory for look in late) / mean(look.memory for look in early) - 1
    return memory, mean(look.files for look in late) - mean(look.files for look in early)
