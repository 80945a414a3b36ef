"""`mgvideo benchmark loader`: clips per second of the loader at each grid of a plan, and CPU time by stage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from mgvideo.cli import keys
from mgvideo.cli.benchmark import (
    ResultLog,
    choose_grids,
    measurement_conditions,
    open_report,
    plain_table,
    print_report,
)
from mgvideo.cli.build import build_indexes, build_plan, build_sampling, loader_options, require_dataset_keys
from mgvideo.cli.recipe import sample_size
from mgvideo.cli.schema import key
from mgvideo.datasets.decoders import Decord, PyAV, TorchCodec
from mgvideo.datasets.pyramid import Pyramid
from mgvideo.datasets.timing import DECODE_FUNCTIONS, STAGES, Clock, DecodeOnlyDataset, TimedDataset, TimedDecoder
from mgvideo.datasets.video import VideoDataset
from mgvideo.loading.loader import Batch, Loader, LoaderOptions, collate
from mgvideo.loading.requests import BatchRequest, ClipRequest, Sample
from mgvideo.plan.plan import Grid, Plan, require

DECODERS: dict[str, Callable[[], Any]] = {"decord": Decord, "pyav": PyAV, "torchcodec": TorchCodec}
ENDLESS_STEPS = range(1_000_000)


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    decoders: list[str] = key([], "decoders to measure: decord, pyav, torchcodec; empty: the run's")
    grids: list[str] = key([], "grids to measure, such as 8x112,32x224; empty: all of the plan")
    seconds: float = key(3.0, "seconds to measure each loader, and each decoder alone, in each round", above=0)
    rounds: int = key(2, "rounds over all of them, so that a change of the machine's load affects all alike", least=1)
    batch: int = key(4, "clips per batch", least=1)
    format: str = key("table", "table, or json for mgvideo plan benchmark=…", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")
    step_time: float | None = key(None, "seconds of a training step, written to the JSON", above=0)


@dataclass
class LoaderTimes:
    """Clips and wall-clock seconds of a loader, and CPU seconds of its workers by stage, summed over rounds."""

    clips: int = 0
    seconds: float = 0.0
    cpu: np.ndarray = field(default_factory=lambda: np.zeros(len(STAGES)))

    @property
    def rate(self) -> float:
        """Clips per second."""
        return self.clips / self.seconds

    def milliseconds(self) -> dict[str, float]:
        """Return CPU milliseconds per clip, by stage."""
        return {stage: 1000 * float(cpu) / self.clips for stage, cpu in zip(STAGES, self.cpu, strict=True)}


@dataclass
class BenchmarkCase:
    """A decoder on the original files or on a pyramid: times of the loader and of decoding alone, by grid."""

    decoder: str
    pyramid: bool
    loader: dict[str, LoaderTimes]
    bare: dict[str, LoaderTimes]

    @property
    def name(self) -> str:
        """Heading of the table."""
        return f"{self.decoder}, {'pyramid' if self.pyramid else 'original files'}"


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(Keys, overrides)
    for name in options.decoders:
        require(name in DECODERS, f"decoders={name}: choose of {', '.join(DECODERS)}")
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Measure all cases and print the report."""
    require_dataset_keys(cfg)
    if "prepare" in cfg.dataset:
        instantiate(cfg.dataset.prepare)
    dataset = instantiate(cfg.dataset.train, decoder=PyAV())
    require(isinstance(dataset.decoder, PyAV), f"dataset {cfg.dataset.name}: frames are images, no video to decode")
    dataset.sampling = build_sampling(cfg, dataset.sampling)
    # a few files may be a sample of a dataset: plan at least 1,000 batches, for realistic shares of phases
    plan = build_plan(cfg, sample_size(cfg, len(dataset)))
    grids = choose_grids(plan, options.grids)
    loader_settings = loader_options(cfg)
    conditions = {
        **measurement_conditions(),
        "workers": loader_settings.num_workers,
        "start_method": loader_settings.start_method,
        "videos": len(dataset),
        "seconds": options.seconds * options.rounds,
    }
    cases = list(make_cases(options, cfg, grids))
    with ResultLog(options.rounds * len(grids) * len(cases), options.out) as log:
        measure_all(cases, dataset, cfg, grids, loader_settings, options, log)
        with open_report(options.out) as file:
            if options.format == "json":
                print(json.dumps(as_json(options, plan, cases, conditions), indent=1), file=file)
            else:
                print_report(file, conditions, [table(plan, case, cases) for case in cases])


def make_cases(options: Keys, cfg: DictConfig, grids: Sequence[Grid]) -> Iterator[BenchmarkCase]:
    """Yield a case for each decoder on the original files and, if `dataset.pyramid` is set, on the pyramid."""
    run_decoder = next(
        (name for name, kind in DECODERS.items() if cfg.decoder._target_.endswith(f".{kind.__name__}")), "decord"
    )
    for name in options.decoders or [run_decoder]:
        for pyramid in (False, True) if cfg.dataset.get("pyramid") else (False,):
            yield BenchmarkCase(name, pyramid, *({grid.name: LoaderTimes() for grid in grids} for _ in range(2)))


def measure_all(
    cases: Sequence[BenchmarkCase],
    dataset: VideoDataset,
    cfg: DictConfig,
    grids: Sequence[Grid],
    loader_settings: LoaderOptions,
    options: Keys,
    log: Callable[[str], None],
) -> None:
    """Measure all cases in turn: the loader, then decoding alone. Each result goes to `log`."""
    for _ in range(options.rounds):
        for grid in grids:
            for case in cases:
                decoder = DECODERS[case.decoder]()
                decoder.indexes = build_indexes(cfg, cfg.dataset.get("pyramid"))
                pyramid = Pyramid(cfg.dataset.pyramid, cfg.dataset.root, decoder) if case.pyramid else None
                requests = partial(random_requests, grid, len(dataset), options.batch)
                clock = Clock(loader_settings.num_workers)
                dataset.decoder = TimedDecoder(pyramid or decoder, clock)
                loader = Loader(TimedDataset(dataset, clock), loader_settings, collate=partial(_timed_collate, clock))
                times, bare = case.loader[grid.name], case.bare[grid.name]
                measure_loader(loader, requests, clock, options.seconds, times)
                clock = Clock(loader_settings.num_workers)
                decode_only = DecodeOnlyDataset(
                    dataset, DECODE_FUNCTIONS[case.decoder], pyramid.locate if pyramid else None, clock
                )
                measure_loader(Loader(decode_only, loader_settings), requests, clock, options.seconds, bare)
                log(f"{case.name}, {grid.name}: {times.rate:.1f} clips/s, decoding alone {bare.rate:.1f}")


def random_requests(grid: Grid, videos: int, batch: int, step: int) -> BatchRequest:
    """Return a request for clips of random videos; the same step gives the same request."""
    rng = np.random.default_rng(step)
    clips = [ClipRequest(int(rng.integers(videos)), grid, int(rng.integers(2**63))) for _ in range(batch)]
    return BatchRequest(clips)


def _timed_collate(clock: Clock, samples: Sequence[Sample]) -> Batch:
    with clock.measure("collate"):
        return collate(samples)


def measure_loader(
    loader: Loader, requests: Callable[[int], BatchRequest], clock: Clock, seconds: float, times: LoaderTimes
) -> None:
    """Load batches for some seconds and add the result to `times`. Measuring starts when all workers run."""
    batches = loader.load_steps(requests, ENDLESS_STEPS)
    for _ in range(max(1, loader.options.num_workers)):
        next(batches)
    before, start = clock.total(), time.monotonic()
    while time.monotonic() - start < seconds:
        times.clips += len(next(batches).clips)
    times.seconds += time.monotonic() - start
    times.cpu += (clock.total() - before).numpy()


def as_json(
    options: Keys, plan: Plan, cases: Sequence[BenchmarkCase], conditions: dict[str, object]
) -> dict[str, object]:
    """Return the report as JSON: what `forecast.read_benchmark` reads, and all rows.

    The former is of the first decoder, on the pyramid if there is one.
    """
    chosen = [case for case in cases if case.decoder == cases[0].decoder][-1]
    step = {} if options.step_time is None else dict.fromkeys(chosen.loader, options.step_time)
    return {
        "step_seconds": step,
        "clips_per_second": {name: loader.rate for name, loader in chosen.loader.items()},
        "workers": conditions["workers"] or None,
        "conditions": conditions,
        "keys": asdict(options),
        "rows": [_row(plan, case, cases, name) for case in cases for name in case.loader],
        "whole_plan": {case.name: rate for case in cases if (rate := plan_rate(plan, case))},
    }


def _row(plan: Plan, case: BenchmarkCase, cases: Sequence[BenchmarkCase], name: str) -> dict[str, Any]:
    loader, bare, base = case.loader[name], case.bare[name], _base_rate(plan, case, cases)
    return {
        "grid": name,
        "decoder": case.decoder,
        "pyramid": case.pyramid,
        "clips_per_second": loader.rate,
        "decode_only": bare.rate,
        "against_base": loader.rate / base if base else None,
        "cpu_milliseconds": loader.milliseconds(),
        "decode_only_cpu_milliseconds": bare.milliseconds()["decode"],
    }


def _base_rate(plan: Plan, case: BenchmarkCase, cases: Sequence[BenchmarkCase]) -> float | None:
    """Return clips per second of the base grid on the original files with the same decoder, if measured."""
    originals = next(other for other in cases if other.decoder == case.decoder and not other.pyramid)
    base = originals.loader.get(f"{plan.base.num_frames}x{plan.base.crop_size}")
    return base.rate if base else None


def plan_rate(plan: Plan, case: BenchmarkCase) -> float | None:
    """Return clips per second over a whole plan, weighted by clips; None if a grid was not measured."""
    seconds = 0.0
    for phase in plan.phases:
        for visits, slot in zip(phase.steps_per_slot(), phase.slots, strict=True):
            if slot.grid.name not in case.loader:
                return None
            seconds += visits * slot.batch / case.loader[slot.grid.name].rate
    return plan.clips_before(plan.steps) / seconds


def table(plan: Plan, case: BenchmarkCase, cases: Sequence[BenchmarkCase]) -> Table:
    """Return a table with a row for each grid and one for the plan: rates, ratios and CPU time per clip."""
    stages = (f"{stage} ms" for stage in STAGES)
    report = plain_table(
        case.name, "grid", "clips/s", "× base", "decode only", "loader/decode", *stages, "decode-only ms"
    )
    for name in case.loader:
        row = _row(plan, case, cases, name)
        rate, bare, against = row["clips_per_second"], row["decode_only"], row["against_base"]
        cpu_ms = [f"{row['cpu_milliseconds'][stage]:.1f}" for stage in STAGES]
        times = "–" if against is None else f"{against:.2f}"
        decode_ms = f"{row['decode_only_cpu_milliseconds']:.1f}"
        report.add_row(name, f"{rate:.1f}", times, f"{bare:.1f}", f"{rate / bare:.0%}", *cpu_ms, decode_ms)
    whole, base = plan_rate(plan, case), _base_rate(plan, case, cases)
    if whole and base:
        report.add_row("plan", f"{whole:.1f}", f"{whole / base:.2f}")
    return report
