"""`mgvideo benchmark augment`: the time of augmentation on the device at each grid, beside a training step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from mgvideo.cli import keys
from mgvideo.cli.app import compose_config
from mgvideo.cli.benchmark import (
    ResultLog,
    choose_grids,
    measurement_conditions,
    open_report,
    plain_table,
    print_report,
)
from mgvideo.cli.build import build_plan
from mgvideo.cli.help import group_options
from mgvideo.cli.recipe import sample_size
from mgvideo.cli.schema import key
from mgvideo.cli.training import build_augmentation
from mgvideo.engine.augmentation import Augmentation
from mgvideo.plan.plan import Grid, require
from mgvideo.plan.shards import BatchShard

from .step import StepBenchmark, parse_variant

CLASSES = 400
BN_GROUP = 8  # clips, or all of a batch if it has fewer


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    options: list[str] = key(["light", "strong"], "options of configs/augment to measure; `run`: the run's own keys")
    grids: list[str] = key([], "grids to measure, such as 8x112,32x224; empty: all of the plan")
    clips: int = key(8, "clips in a step at the base grid; smaller grids have more, for the same volume", least=1)
    variant: str = key("auto/channels_last/off", "precision/memory format/compilation of the training step")
    seconds: float = key(2.0, "seconds to measure each combination in each round; at least once", above=0)
    rounds: int = key(3, "rounds over all of them, so that a change of the machine's load affects all alike", least=1)
    format: str = key("table", "table or json", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass
class AugmentTimes:
    """Seconds of a batch at one grid, on a CPU processor time: of the training step, and of each augmentation."""

    grid: str
    clips: int
    step: float = 0.0  # median
    augment: dict[str, float] = field(default_factory=dict)  # medians by option


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(Keys, overrides)
    known = ("run", *group_options()["augment"])
    for name in options.options:
        require(name in known, f"options={name}: choose from {', '.join(known)}")
    return options


def run(options: Keys, cfg: DictConfig) -> None:
    """Measure all grids and options in turn, and print the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = build_plan(cfg, sample_size(cfg))
    augmentations = {name: _build(name, cfg, device) for name in options.options}
    rows = []
    with ResultLog(len(choose_grids(plan, options.grids)), options.out) as log:
        steps = StepBenchmark(instantiate(cfg.model), parse_variant(options.variant, device), plan)
        for grid in choose_grids(plan, options.grids):
            clips = max(1, round(options.clips * plan.base.num_frames * plan.base.crop_size**2 / grid.volume))
            rows.append(measure(grid, clips, steps, augmentations, options))
            parts = [f"{name} {1000 * seconds:.0f} ms" for name, seconds in rows[-1].augment.items()]
            log(f"{grid.name}, {clips} clips: step {1000 * rows[-1].step:.0f} ms, {', '.join(parts)}")
        conditions = {**measurement_conditions(device), "threads": torch.get_num_threads(), "variant": options.variant}
        with open_report(options.out) as file:
            if options.format == "json":
                print(
                    json.dumps({"conditions": conditions, "rows": [asdict(row) for row in rows]}, indent=1), file=file
                )
            else:
                print_report(file, conditions, [table(cfg.model._target_.rpartition(".")[2], rows)])


def _build(name: str, cfg: DictConfig, device: torch.device) -> Augmentation | None:
    """Build the augmentation of an option, with the normalisation of the run's network."""
    if name != "run":
        chosen = compose_config("run", [f"augment={name}", "output_dir=none"])
        chosen.normalize = cfg.normalize
        cfg = chosen
    return build_augmentation(cfg, CLASSES, device)


def measure(
    grid: Grid,
    clips: int,
    steps: StepBenchmark,
    augmentations: dict[str, Augmentation | None],
    options: Keys,
) -> AugmentTimes:
    """Measure one grid: medians of the training step and of each augmentation, which take turns."""
    device = steps.device
    shape = (clips, grid.frames, grid.size, grid.size, 3)
    batch = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.zeros(clips, dtype=torch.int64, device=device)
    pixels = batch.float().permute(0, 4, 1, 2, 3)
    group = BN_GROUP if clips % BN_GROUP == 0 else clips
    shard = BatchShard(clips, 0, clips, clips // group, group, (0,))
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in ("step", *augmentations)}
    for _ in range(options.rounds):
        times["step"] += _times(lambda: steps.step(pixels, labels), device, options.seconds)
        for name, augmentation in augmentations.items():
            if augmentation is not None:
                augment = partial(augmentation, batch, labels, shard=shard)
                times[name] += _times(
                    lambda call=augment: call(seeds=rng.integers(2**64, size=clips, dtype=np.uint64)),  # type: ignore[misc]
                    device,
                    options.seconds,
                )
    medians = {name: float(np.median(values)) if values else 0.0 for name, values in times.items()}
    return AugmentTimes(grid.name, clips, medians.pop("step"), medians)


def _times(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Return the time of each of the calls that fit into some seconds, without the first one, which may load kernels.

    On a CPU it is the processor time of all threads, which other processes of a busy machine change less.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < seconds:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return times[1:]


def table(model: str, rows: Sequence[AugmentTimes]) -> Table:
    """Return a table with a row for each grid: milliseconds, and the share that augmentation adds to a step."""
    names = list(rows[0].augment) if rows else []
    columns: list[Any] = [column for name in names for column in (f"{name} ms", f"{name} / step")]
    report = plain_table(
        f"augmentation beside a training step of {model}; on a CPU, ms of processor time",
        "grid",
        "clips",
        "step ms",
        *columns,
    )
    for row in rows:
        cells = [
            text
            for name in names
            for text in (f"{1000 * row.augment[name]:.0f}", f"{row.augment[name] / row.step:.0%}")
        ]
        report.add_row(row.grid, str(row.clips), f"{1000 * row.step:.0f}", *cells)
    return report
