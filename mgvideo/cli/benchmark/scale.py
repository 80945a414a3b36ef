"""`mgvideo benchmark scale`: what a list of hundreds of thousands of videos costs a rank and its loader workers."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import psutil
import torch
from omegaconf import DictConfig
from rich.table import Table

from mgvideo.cli import keys
from mgvideo.cli.benchmark import ResultLog, measurement_conditions, open_report, plain_table, print_report
from mgvideo.cli.build import build_plan, build_schedule
from mgvideo.cli.schema import key
from mgvideo.datasets.kinetics import kinetics
from mgvideo.datasets.motion import Knobs, make_motion
from mgvideo.datasets.pyav import PyAV
from mgvideo.loading.loader import Loader, LoaderOptions
from mgvideo.loading.requests import BatchRequest
from mgvideo.loading.sampler import ClipSampler
from mgvideo.plan.plan import Plan

CLASSES = 400
VAL_SHARE = 10  # one video in so many is listed for validation too
WARM_UP_CLIPS = 2  # the small list of comparison has so many entries a file


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    entries: int = key(300_000, "videos in the list", least=1000)
    files: int = key(300, "real files, to each of which equally many entries are hard links", least=1)
    ranks: int = key(128, "number of ranks, of which the first is measured", least=1)
    workers: int = key(16, "loader workers of the rank", least=1)
    steps: int = key(20, "steps to measure", least=2)
    folder: str | None = key(None, "folder to make the files in; null: a temporary one")
    format: str = key("table", "table or json", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass(frozen=True)
class ScaleRow:
    """A measured quantity and the limit that it must keep."""

    name: str
    value: float
    unit: str
    limit: float | None


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options: Keys = keys.read(Keys, overrides)
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Make the files, measure all rows and print the report."""
    conditions = {
        **measurement_conditions(),
        "entries": options.entries,
        "files": options.files,
        "workers": options.workers,
        "ranks": options.ranks,
        "batch": cfg.base.batch_size,
    }
    rows = []
    with _work_folder(options.folder) as folder, ResultLog(13, options.out) as log:
        make_files(folder, options.entries, options.files)
        for row in measure(folder, options, cfg):
            rows.append(row)
            log(f"{row.name}: {row.value:.3g} {row.unit}")
        with open_report(options.out) as file:
            if options.format == "json":
                print(json.dumps({"conditions": conditions, "rows": list(map(asdict, rows))}, indent=1), file=file)
            else:
                print_report(file, conditions, [table(rows)])


@contextmanager
def _work_folder(folder: str | None) -> Iterator[Path]:
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="mgvideo-scale-") as temporary:
        yield Path(temporary)


def make_files(folder: Path, entries: int, files: int) -> None:
    """Make `large/` and `small/`, datasets with Kinetics' official CSV files, whose videos are links to real files."""
    motion = make_motion(str(folder / "motion"), Knobs(train=files, val=8, frames=48))
    videos = sorted(motion.glob("train/*.mp4"))
    for name, count in (("large", entries), ("small", WARM_UP_CLIPS * max(CLASSES, files))):
        root = folder / name
        if (root / "train.csv").exists():
            shutil.rmtree(root / ".mgvideo", ignore_errors=True)
            continue
        rows = []
        for number in range(count):
            label = f"class {number % CLASSES:03d}"
            row = (label, f"{number:011d}", number % 600, number % 600 + 10, "train")
            target = root / "train" / label / f"{row[1]}_{row[2]:06d}_{row[3]:06d}.mp4"
            if number < CLASSES:
                target.parent.mkdir(parents=True, exist_ok=True)
            os.link(videos[number % len(videos)], target)
            rows.append(row)
        for split, listed in (("val", rows[: max(CLASSES, count // VAL_SHARE)]), ("train", rows)):
            with open(root / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(("label", "youtube_id", "time_start", "time_end", "split"))
                writer.writerows((*row[:4], split) for row in listed)


def measure(folder: Path, options: Keys, cfg: DictConfig) -> Iterator[ScaleRow]:
    """Yield all rows. Start-up is measured in new processes, the rest in this one."""
    for name, limit in (("first start", None), ("start of another rank", 1.0)):
        seconds, private, peak = _in_new_process(partial(_start, str(folder / "large")))
        yield ScaleRow(f"{name}: training and validation lists", seconds, "s", limit)
        yield ScaleRow(f"{name}: private memory of the lists", private, "MB", 100.0)
        yield ScaleRow(f"{name}: at its peak", peak, "MB", None if limit is None else 100.0)
    plan = build_plan(cfg, options.entries)
    plan = build_schedule(cfg)(replace(plan.base, batch_size=cfg.base.batch_size), options.entries)
    sampler = ClipSampler(plan, options.entries, seed=0)
    times = []
    for step in range(options.steps):
        start = time.thread_time()
        sampler.shard(step, 0, options.ranks)
        times.append(time.thread_time() - start)
    yield ScaleRow("clips of a step, computed by a worker", 1000 * median(times), "ms", 5.0)
    yield from _measure_loader(folder, options, plan)


def _in_new_process(work: Callable[[], Any]) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work)


def _start(root: str) -> tuple[float, float, float]:
    """Build both splits; returns seconds, MB of private memory that they take, and MB at the peak."""
    kinetics(str(Path(root).parent / "small"), "train.csv", CLASSES, decoder=PyAV())  # imports and allocators
    _peak_mb()
    peak_before, before, started = _peak_mb(), _private_mb(os.getpid()), time.perf_counter()
    datasets = [kinetics(root, f"{split}.csv", CLASSES, split=split, decoder=PyAV()) for split in ("train", "val")]
    seconds = time.perf_counter() - started
    assert len(datasets[0]) >= len(datasets[1]) > 0
    return seconds, _private_mb(os.getpid()) - before, _peak_mb() - peak_before


def _private_mb(pid: int) -> float:
    """Return the memory that a process has written and shares with no other, in MB; batches are in shared memory."""
    maps = psutil.Process(pid).memory_maps(grouped=False)
    return sum(region.private_dirty for region in maps if not region.path.startswith("/dev/shm/")) / 1e6


def _peak_mb() -> float:
    """Return the largest memory of this process since the last call, in MB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


def _measure_loader(folder: Path, options: Keys, plan: Plan) -> Iterator[ScaleRow]:
    """Yield the rows that need workers: memory, and the first batch at the start and in the middle of an epoch."""
    memory = {}
    for name in ("small", "large"):
        dataset = kinetics(str(folder / name), "train.csv", CLASSES, split="train", decoder=PyAV())
        loader = Loader(dataset, LoaderOptions(options.workers, 1))
        requests = partial(_requests, ClipSampler(plan, len(dataset), 0), options.ranks)
        if name == "small":
            memory[name], _, _ = _load(loader, requests, 0, options)
            continue
        memory[name], first, host = _load(loader, requests, 0, options)
        middle = next(iter(plan.phases)).num_steps // 2
        _, resumed, _ = _load(loader, requests, middle, options)
    yield ScaleRow("private memory of a worker", memory["large"], "MB", None)
    yield ScaleRow("of that, for the lists", memory["large"] - memory["small"], "MB", 10.0)
    yield ScaleRow(
        "private memory of all workers for the lists",
        options.workers * (memory["large"] - memory["small"]),
        "MB",
        160.0,
    )
    yield ScaleRow("first batch, from the start of the workers", first, "s", 45.0)
    yield ScaleRow("first batch after a resume in mid-epoch", resumed, "s", 45.0)
    yield ScaleRow("CPU time of the training process to take a batch", host, "ms", 10.0)


def _requests(sampler: ClipSampler, ranks: int, step: int) -> BatchRequest:
    return sampler.shard(step, 0, ranks)


def _load(loader: Loader, requests: Any, first: int, options: Keys) -> tuple[float, float, float]:
    """Load steps; returns MB of private memory of a worker, seconds to the first batch, CPU ms for each other batch."""
    others = {child.pid for child in multiprocessing.active_children()}
    started = time.perf_counter()
    batches = loader.load_steps(requests, range(first, first + options.workers + options.steps))
    pids = [child.pid for child in multiprocessing.active_children() if child.pid not in others]
    next(batches)
    seconds = time.perf_counter() - started
    times = []
    for _ in range(options.steps - 1):
        start = time.thread_time()
        batch = next(batches)
        times.append(time.thread_time() - start)
        assert batch.clips.dtype == torch.uint8
    memory = mean(_private_mb(pid) for pid in pids if pid is not None)
    for process in multiprocessing.active_children():
        if process.pid in pids:
            process.kill()
    return memory, seconds, 1000 * median(times)


def table(rows: Sequence[ScaleRow]) -> Table:
    """Return a table with a line for each row."""
    report = plain_table("a rank and its workers at a large list", "quantity", "measured", "limit", "kept")
    for row in rows:
        limit = "" if row.limit is None else f"{row.limit:g} {row.unit}"
        kept = "" if row.limit is None else "yes" if row.value <= row.limit else "no"
        report.add_row(row.name, f"{row.value:.3g} {row.unit}", limit, kept)
    return report
