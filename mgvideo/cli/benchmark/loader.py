"""`mgvideo benchmark loader`: clips a second that the loader delivers at each grid of a plan, and what limits them."""

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
from mgvideo.cli.benchmark import choose_grids, conditions, output, plain_table, show
from mgvideo.cli.build import build_plan, loader_options, require_dataset_keys
from mgvideo.cli.progress import ProgressLog
from mgvideo.cli.schema import key
from mgvideo.datasets.decoders import Decord, PyAV, TorchCodec
from mgvideo.datasets.pyramid import Pyramid
from mgvideo.datasets.timing import DECODE_FUNCTIONS, STAGES, Clock, DecodeOnlyDataset, TimedDataset, TimedDecoder
from mgvideo.datasets.video import VideoDataset
from mgvideo.loading.loader import Batch, Loader, LoaderOptions, collate
from mgvideo.loading.requests import BatchRequest, ClipRequest, Sample
from mgvideo.plan.plan import Grid, Plan, require

DECODERS: dict[str, Callable[[], Any]] = {"decord": Decord, "pyav": PyAV, "torchcodec": TorchCodec}
ENDLESS = range(1_000_000)  # steps


@dataclass
class Keys:
    """What this program takes besides the keys of a run."""

    decoders: list[str] = key([], "of decord, pyav, torchcodec; none: the run's")
    grids: list[str] = key([], "such as 8x112,32x224; none: all of the plan's")
    seconds: float = key(3.0, "to measure each loader, and each bare library, in each round")
    rounds: int = key(2, "times round all of them, so that a change of the machine's load meets all alike")
    batch: int = key(4, "clips a batch")
    format: str = key("table", "table or json, which mgvideo plan benchmark=… reads")
    out: str | None = key(None, "file to write to; null: the terminal")
    step_time: float | None = key(None, "seconds of a training step, for that JSON")


@dataclass
class Measured:
    """Clips and wall-clock seconds of a loader, and CPU seconds of its workers by stage."""

    clips: int = 0
    seconds: float = 0.0
    cpu: np.ndarray = field(default_factory=lambda: np.zeros(len(STAGES)))

    @property
    def rate(self) -> float:
        """Clips a second."""
        return self.clips / self.seconds

    def milliseconds(self) -> dict[str, float]:
        """CPU milliseconds a clip, by stage."""
        return {stage: 1000 * float(cpu) / self.clips for stage, cpu in zip(STAGES, self.cpu, strict=True)}


@dataclass
class Case:
    """A decoder on the original files or on a pyramid: loader and bare library, by grid."""

    decoder: str
    pyramid: bool
    loader: dict[str, Measured]
    bare: dict[str, Measured]

    @property
    def name(self) -> str:
        """For a heading."""
        return f"{self.decoder}, {'pyramid' if self.pyramid else 'original files'}"


def read_keys(overrides: Sequence[str]) -> Keys:
    """This program's own keys. Raises UserError where a value is of no use."""
    given = keys.read(Keys, overrides)
    for name in given.decoders:
        require(name in DECODERS, f"decoders={name}: choose of {', '.join(DECODERS)}")
    require(given.format in ("table", "json"), f"format={given.format}: choose table or json")
    require(given.seconds > 0, f"seconds={given.seconds}: give a number above 0")
    require(given.rounds >= 1, f"rounds={given.rounds}: give a whole number from 1 up")
    require(given.batch >= 1, f"batch={given.batch}: give a whole number from 1 up")
    require(given.step_time is None or given.step_time > 0, f"step_time={given.step_time}: give seconds above 0")
    return given


def run(given: Keys, cfg: DictConfig) -> None:
    """Measure and report."""
    require_dataset_keys(cfg)
    if "prepare" in cfg.dataset:
        instantiate(cfg.dataset.prepare)
    dataset = instantiate(cfg.dataset.train, decoder=PyAV())
    require(isinstance(dataset.decoder, PyAV), f"dataset {cfg.dataset.name}: frames are images, no video to decode")
    # a few files may stand for a dataset: the plan is a long one, whose phases have their true shares
    plan = build_plan(cfg, max(len(dataset), 1000 * cfg.base.batch_size))
    grids = choose_grids(plan, given.grids)
    options = loader_options(cfg)
    about = {
        **conditions(),
        "workers": options.num_workers,
        "start_method": options.start_method,
        "videos": len(dataset),
        "seconds": given.seconds * given.rounds,
    }
    cases = list(open_cases(given, cfg, grids))
    measure_all(cases, dataset, cfg, grids, options, given)
    with output(given.out) as file:
        if given.format == "json":
            print(json.dumps(as_json(given, plan, cases, about), indent=1), file=file)
        else:
            show(file, about, [table(plan, case, cases) for case in cases])


def open_cases(given: Keys, cfg: DictConfig, grids: Sequence[Grid]) -> Iterator[Case]:
    """Every decoder on the originals and, where `dataset.pyramid` names one, on the pyramid."""
    own = next(
        (name for name, kind in DECODERS.items() if cfg.decoder._target_.endswith(f".{kind.__name__}")), "decord"
    )
    for name in given.decoders or [own]:
        for pyramid in (False, True) if cfg.dataset.get("pyramid") else (False,):
            yield Case(name, pyramid, *({grid.name: Measured() for grid in grids} for _ in range(2)))


def measure_all(
    cases: Sequence[Case],
    dataset: VideoDataset,
    cfg: DictConfig,
    grids: Sequence[Grid],
    options: LoaderOptions,
    given: Keys,
) -> None:
    """Fill in the cases: the loader and the bare library in turn."""
    total, done = given.rounds * len(grids) * len(cases), 0
    with ProgressLog("benchmark") as progress:
        for _ in range(given.rounds):
            for grid in grids:
                for case in cases:
                    decoder = DECODERS[case.decoder]()
                    pyramid = Pyramid(cfg.dataset.pyramid, cfg.dataset.root, decoder) if case.pyramid else None
                    requests = partial(random_requests, grid, len(dataset), given.batch)
                    clock = Clock(options.num_workers)
                    dataset.decoder = TimedDecoder(pyramid or decoder, clock)
                    loader = Loader(TimedDataset(dataset, clock), options, collate=partial(_timed_collate, clock))
                    measure(loader, requests, clock, given.seconds, case.loader[grid.name])
                    clock = Clock(options.num_workers)
                    bare = DecodeOnlyDataset(
                        dataset, DECODE_FUNCTIONS[case.decoder], pyramid.locate if pyramid else None, clock
                    )
                    measure(Loader(bare, options), requests, clock, given.seconds, case.bare[grid.name])
                    done += 1
                    progress(done, total)


def random_requests(grid: Grid, videos: int, batch: int, step: int) -> BatchRequest:
    """Request clips of random videos, the same for every loader."""
    rng = np.random.default_rng(step)
    clips = [ClipRequest(int(rng.integers(videos)), grid, int(rng.integers(2**63))) for _ in range(batch)]
    return BatchRequest(clips)


def _timed_collate(clock: Clock, samples: Sequence[Sample]) -> Batch:
    with clock.measure("collate"):
        return collate(samples)


def measure(
    loader: Loader, requests: Callable[[int], BatchRequest], clock: Clock, seconds: float, into: Measured
) -> None:
    """Add what a loader delivers in some seconds, from when all its workers are at work."""
    batches = loader.open(requests, ENDLESS)
    for _ in range(max(1, loader.options.num_workers)):
        next(batches)
    before, start = clock.total(), time.monotonic()
    while time.monotonic() - start < seconds:
        into.clips += len(next(batches).clips)
    into.seconds += time.monotonic() - start
    into.cpu += (clock.total() - before).numpy()


def as_json(given: Keys, plan: Plan, cases: Sequence[Case], about: dict[str, object]) -> dict[str, object]:
    """What `forecast.read_benchmark` reads (of the first decoder, on the pyramid if there is one), and all rows."""
    best = [case for case in cases if case.decoder == cases[0].decoder][-1]
    step = {} if given.step_time is None else dict.fromkeys(best.loader, given.step_time)
    return {
        "step_seconds": step,
        "clips_per_second": {name: loader.rate for name, loader in best.loader.items()},
        "workers": about["workers"] or None,
        "conditions": about,
        "keys": asdict(given),
        "rows": [_row(plan, case, cases, name) for case in cases for name in case.loader],
        "whole_plan": {case.name: rate for case in cases if (rate := plan_rate(plan, case))},
    }


def _row(plan: Plan, case: Case, cases: Sequence[Case], name: str) -> dict[str, Any]:
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


def _base_rate(plan: Plan, case: Case, cases: Sequence[Case]) -> float | None:
    """Clips a second of the base grid on the original files with the same decoder, where it was measured."""
    originals = next(other for other in cases if other.decoder == case.decoder and not other.pyramid)
    base = originals.loader.get(f"{plan.base.num_frames}x{plan.base.crop_size}")
    return base.rate if base else None


def plan_rate(plan: Plan, case: Case) -> float | None:
    """Clips a second over a whole plan, each grid weighted by its clips; None where one was not measured."""
    seconds = 0.0
    for phase in plan.phases:
        for visits, slot in zip(phase.visits(), phase.slots, strict=True):
            if slot.grid.name not in case.loader:
                return None
            seconds += visits * slot.batch / case.loader[slot.grid.name].rate
    return plan.clips_before(plan.steps) / seconds


def table(plan: Plan, case: Case, cases: Sequence[Case]) -> Table:
    """A row a grid, and one for the whole plan: rates, ratios within this run, CPU time a clip."""
    stages = (f"{stage} ms" for stage in STAGES)
    shown = plain_table(case.name, "grid", "clips/s", "× base", "decode only", "of it", *stages, "bare ms")
    for name in case.loader:
        row = _row(plan, case, cases, name)
        rate, bare, against = row["clips_per_second"], row["decode_only"], row["against_base"]
        spent = [f"{row['cpu_milliseconds'][stage]:.1f}" for stage in STAGES]
        times = "–" if against is None else f"{against:.2f}"
        least = f"{row['decode_only_cpu_milliseconds']:.1f}"
        shown.add_row(name, f"{rate:.1f}", times, f"{bare:.1f}", f"{rate / bare:.0%}", *spent, least)
    whole, base = plan_rate(plan, case), _base_rate(plan, case, cases)
    if whole and base:
        shown.add_row("plan", f"{whole:.1f}", f"{whole / base:.2f}")
    return shown
