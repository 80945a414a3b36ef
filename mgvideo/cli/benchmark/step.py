"""`mgvideo benchmark step`: time a training step at each grid, by model, precision, memory format and compilation."""

from __future__ import annotations

import ctypes
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import psutil
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn

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
from mgvideo.cli.plan import clip_flops
from mgvideo.cli.recipe import sample_size
from mgvideo.cli.schema import COMPILE, key
from mgvideo.engine.precision import Precision, choose_precision, probe_convolutions
from mgvideo.engine.train_step import compile_model
from mgvideo.layers.batchnorm import convert_group_batchnorm, deferred_running_stats, set_bn_groups
from mgvideo.plan.forecast import total_cost
from mgvideo.plan.plan import Grid, Plan, require
from mgvideo.plan.schedules import baseline_of

REFERENCE = "fp32/contiguous/off"
MAX_SETTLING_STEPS, MAX_PAGE_FAULTS = 6, 1000  # untimed steps, until one causes fewer page faults than this
TRAINING_COST = 3  # FLOPs of forward and backward, relative to forward


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    models: list[str] = key([], "models of configs/model to measure; empty: the run's")
    grids: list[str] = key([], "grids to measure, such as 8x112,32x224; empty: all of the plan")
    variants: list[str] = key(
        [REFERENCE, "auto/channels_last/off"],
        "precision/memory format/compilation[/BN groups]; the first is the reference for the others",
    )
    emulated: bool = key(False, "also measure bf16 on a CPU without bf16 instructions, which is several times slower")
    clips: int = key(4, "clips in a step at the base grid; smaller grids have more, for the same volume", least=1)
    batch: int | None = key(None, "clips in a step, the same at every grid; replaces clips", least=1)
    seconds: float = key(3.0, "seconds to measure each combination in each round; at least one step", above=0)
    tune: bool = key(True, "let cuDNN time its kernels first, as runs with many steps do: up to 20 s a combination")
    rounds: int = key(2, "rounds over all of them, so that a change of the machine's load affects all alike", least=1)
    format: str = key("table", "table, or json for mgvideo plan benchmark=…", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass
class StepTimes:
    """Times of the training steps at one grid under one variant."""

    clips: int
    flops: float  # of a step; a multiply-add counts as two
    warm_up: float = 0.0  # seconds of the first step
    times: list[float] = field(default_factory=list)
    memory: float = 0.0  # peak bytes, minus what was allocated before, such as weights

    @property
    def seconds(self) -> float:
        """Median time of a step."""
        return sorted(self.times)[len(self.times) // 2]


@dataclass(frozen=True)
class Variant:
    """Precision, memory format, compilation and BN groups that a network runs with."""

    name: str
    precision: Precision
    compile: str
    bn_groups: int = 1  # of a batch


class StepBenchmark:
    """A network with an optimizer, for training steps without the trainer."""

    def __init__(self, model: nn.Module, variant: Variant, plan: Plan) -> None:
        self.variant, self.device = variant, variant.precision.device
        self.model = variant.precision.place(convert_group_batchnorm(model)).train()
        self.forward = self.model if variant.compile == "off" else compile_model(self.model, variant.compile, plan)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9, nesterov=True, fused=True)

    def step(self, clips: Tensor, labels: Tensor) -> None:
        """Take a step: forward, backward, optimizer. Waits until the device has finished."""
        self.optimizer.zero_grad(set_to_none=True)
        with deferred_running_stats(self.model), self.variant.precision.autocast():
            logits = self.forward(clips)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, grid: Grid, cell: StepTimes, seconds: float) -> None:
        """Take steps for some seconds and add their times to `cell`. The very first one counts as warm-up."""
        set_bn_groups(self.model, math.gcd(self.variant.bn_groups, cell.clips))
        shape = (cell.clips, grid.frames, grid.size, grid.size, 3)
        # permuted frames are already channels_last_3d, as from the loader; for contiguous, copy before timing
        clips = torch.randn(shape, device=self.device).permute(0, 4, 1, 2, 3)
        if not self.variant.precision.channels_last:
            clips = clips.contiguous()
        labels = torch.zeros(cell.clips, dtype=torch.int64, device=self.device)
        started = time.perf_counter()
        self.step(clips, labels)
        cell.warm_up = cell.warm_up or time.perf_counter() - started
        peak_memory = PeakMemory(self.device)
        for _ in range(MAX_SETTLING_STEPS):  # pages that PeakMemory returned to the system fault in again
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            self.step(clips, labels)
            if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < MAX_PAGE_FAULTS:
                break
        started = time.perf_counter()
        while not cell.times or time.perf_counter() - started < seconds:
            start = time.perf_counter()
            self.step(clips, labels)
            cell.times.append(time.perf_counter() - start)
        cell.memory = max(cell.memory, peak_memory.bytes())


class PeakMemory:
    """Peak memory since this object was created, minus the memory in use at that time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # return memory that earlier steps freed to the system
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # reset VmHWM, the peak of this process
            file.write("5")
        self.before = psutil.Process().memory_info().rss

    def bytes(self) -> float:
        """Return the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1]) - self.before


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(Keys, overrides)
    require(bool(options.variants), f"variants=[]: give at least one, such as {REFERENCE}")
    for name in options.variants:
        parts = [*name.split("/"), "1"]
        valid = len(parts) in (4, 5) and parts[1] in ("contiguous", "channels_last") and parts[2] in COMPILE
        valid = valid and parts[3].isdecimal() and int(parts[3]) >= 1
        form = f"precision/contiguous or channels_last/{' or '.join(COMPILE)}, and /BN groups if more than 1"
        require(valid, f"variants={name}: write {form}")
    return options


def parse_variant(name: str, device: torch.device) -> Variant:
    """Parse `precision/memory format/compilation[/BN groups]`."""
    precision, layout, mode, *groups = name.split("/")
    chosen = replace(choose_precision(precision, device), channels_last=layout == "channels_last")
    return Variant(name, chosen, mode, *map(int, groups))


def drop_emulated_variants(variants: Sequence[Variant]) -> list[Variant]:
    """Leave out variants in bf16 if this CPU emulates it, and print which.

    Raises:
        UserError: no variant is left.
    """
    names = [v.name for v in variants if v.precision.warning]
    if names:
        reason = "this CPU does not train in bf16 instructions; add emulated=true to measure it anyway"
        require(len(names) < len(variants), f"variants={','.join(names)}: {reason}")
        print(f"left out: {', '.join(names)}: {reason}", file=sys.stderr)
    return [v for v in variants if v.name not in names]


def run(options: Keys, cfg: DictConfig) -> None:
    """Measure all models and variants, and print the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = build_plan(cfg, sample_size(cfg))
    torch.backends.cudnn.benchmark = options.tune
    grids = choose_grids(plan, options.grids)
    variants = [parse_variant(name, device) for name in options.variants]
    if not options.emulated:
        variants = drop_emulated_variants(variants)
    conditions = {**measurement_conditions(device), "threads": torch.get_num_threads()}
    run_model = cfg.model._target_.rpartition(".")[2]
    models = {name: compose_config("run", [f"model={name}", "output_dir=none"]) for name in options.models}
    models = models or {run_model: cfg}
    with ResultLog(len(models) * options.rounds * len(grids) * len(variants), options.out) as log:
        cells = {
            name: measure_model(options, model, plan, grids, variants, partial(_log_cell, log, name))
            for name, model in models.items()
        }
        peaks = {v.name: measure_peak_flops(v.precision) for v in variants}
        write_report(options, plan, cells, peaks, conditions)


def _log_cell(log: ResultLog, model: str, variant: str, grid: str, cell: StepTimes) -> None:
    log(f"{model}, {variant}, {grid}: {1000 * cell.seconds:.0f} ms for {cell.clips} clips")


def write_report(
    options: Keys,
    plan: Plan,
    cells: dict[str, dict[str, dict[str, StepTimes]]],
    peaks: dict[str, float],
    conditions: dict[str, Any],
) -> None:
    """Write the report of all models and variants."""
    with open_report(options.out) as file:
        if options.format == "json":
            print(json.dumps(as_json(options, plan, cells, peaks, conditions), indent=1), file=file)
        else:
            tables = [table(f"{model}, {v}", rows, peaks[v], rows_of) for model, rows_of in cells.items()
                      for v, rows in rows_of.items()]  # fmt: skip
            print_report(file, conditions, [*tables, *saving_tables(plan, cells)])


def measure_model(
    options: Keys,
    cfg: DictConfig,
    plan: Plan,
    grids: Sequence[Grid],
    variants: Sequence[Variant],
    on_result: Callable[[str, str, StepTimes], None] = lambda *_: None,
) -> dict[str, dict[str, StepTimes]]:
    """Measure one model. Returns times by variant and grid; variants take turns.

    `on_result` is called with variant, grid and times after each measurement.
    """
    macs = clip_flops(cfg)
    volume = plan.base.num_frames * plan.base.crop_size**2
    benches: dict[str, StepBenchmark] = {}
    cells: dict[str, dict[str, StepTimes]] = {}
    for v in variants:
        torch.manual_seed(0)
        benches[v.name] = StepBenchmark(instantiate(cfg.model), v, plan)
        faults = probe_convolutions(benches[v.name].model, grids, v.precision)
        for fault in (*faults.wrong, *faults.slow):
            print(f"warning: torch {torch.__version__} in {v.precision}: {fault}", file=sys.stderr)
        cells[v.name] = {}
        for grid in grids:
            clips = options.batch or max(1, round(options.clips * volume / grid.volume))
            cells[v.name][grid.name] = StepTimes(clips, TRAINING_COST * 2 * macs(grid) * clips)
    for _ in range(options.rounds):
        for grid in grids:
            for v in variants:
                cell = cells[v.name][grid.name]
                benches[v.name].measure(grid, cell, options.seconds)
                on_result(v.name, grid.name, cell)
    return cells


def measure_peak_flops(precision: Precision, seconds: float = 1.0) -> float:
    """Measure FLOPs per second of a large matrix product in the same precision.

    On a GPU, float32 uses TF32 if convolutions do.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    largest = 8192 if precision.device.type == "cuda" else 2048
    n = largest // 16
    while n < largest and _product_seconds(n, precision) < seconds / 10:  # a smaller one is enough for emulated bf16
        n *= 2
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        best = min(best, _product_seconds(n, precision))
    return 2 * n**3 / best


def _product_seconds(n: int, precision: Precision) -> float:
    a = torch.randn(n, n, device=precision.device).to(precision.dtype or torch.float32)
    if precision.device.type == "cuda":
        torch.cuda.synchronize(precision.device)
    start = time.perf_counter()
    a @ a
    if precision.device.type == "cuda":
        torch.cuda.synchronize(precision.device)
    return time.perf_counter() - start


def table(
    title: str, rows: dict[str, StepTimes], peak_flops: float, all_rows: dict[str, dict[str, StepTimes]]
) -> Table:
    """Return a table with a row for each grid.

    `× reference` is the speed relative to the first variant; `per FLOP` is the time per FLOP relative to the largest
    grid.
    """
    report = plain_table(
        title, "grid", "clips", "ms", "clips/s", "TFLOP/s", "of peak", "× reference", "per FLOP", "first ms", "MiB",
        "memory/base",
    )  # fmt: skip
    reference = next(iter(all_rows.values()))
    base = rows[list(rows)[-1]]
    for name, cell in rows.items():
        rate = cell.flops / cell.seconds
        report.add_row(
            name,
            str(cell.clips),
            f"{1000 * cell.seconds:.0f}",
            f"{cell.clips / cell.seconds:.1f}",
            f"{rate / 1e12:.2f}",
            f"{rate / peak_flops:.0%}",
            f"{reference[name].seconds / cell.seconds:.2f}",
            f"{base.flops / base.seconds / rate:.2f}",
            f"{1000 * cell.warm_up:.0f}",
            f"{cell.memory / 2**20:.0f}",
            f"{cell.memory / max(1, base.memory):.2f}",
        )
    return report


def time_saved(plan: Plan, rows: dict[str, StepTimes]) -> float | None:
    """Return compute time of the baseline over that of the plan; None if a grid was not measured."""
    if not {slot.grid.name for phase in plan.phases for slot in phase.slots} <= rows.keys():
        return None
    times = {name: cell.seconds / cell.clips for name, cell in rows.items()}
    return total_cost(baseline_of(plan).phases, lambda g: times[g.name]) / total_cost(
        plan.phases, lambda g: times[g.name]
    )


def saving_tables(plan: Plan, cells: dict[str, dict[str, dict[str, StepTimes]]]) -> list[Table]:
    """Return a table of the compute time and steps that the plan saves, or no table if grids are missing."""
    report = plain_table(f"{plan.schedule} over the baseline", "model, variant", "time saved", "steps saved")
    steps = baseline_of(plan).steps / plan.steps
    for model, variants in cells.items():
        for name, rows in variants.items():
            ratio = time_saved(plan, rows)
            if ratio:
                report.add_row(f"{model}, {name}", f"{ratio:.2f}×", f"{steps:.2f}×")
    return [report] if report.rows else []


def as_json(
    options: Keys,
    plan: Plan,
    cells: dict[str, dict[str, dict[str, StepTimes]]],
    peaks: dict[str, float],
    conditions: dict,
) -> dict[str, Any]:
    """Return the report as JSON: what `forecast.read_benchmark` reads (first model, last variant), and all rows."""
    first = list(next(iter(cells.values())).values())[-1]
    return {
        "step_seconds": {name: cell.seconds for name, cell in first.items()},
        "step_clips": {name: cell.clips for name, cell in first.items()},
        "conditions": conditions,
        "keys": asdict(options),
        "peak_flops": peaks,
        "rows": [
            {"model": model, "variant": v, "grid": name, **asdict(cell), "seconds": cell.seconds}
            for model, variants in cells.items()
            for v, rows in variants.items()
            for name, cell in rows.items()
        ],
        "time_saved": {
            f"{m}, {v}": time_saved(plan, rows) for m, variants in cells.items() for v, rows in variants.items()
        },
    }
