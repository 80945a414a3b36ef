"""`mgvideo benchmark step`: a training step at each grid of a plan, by model, precision, memory format, compilation."""

from __future__ import annotations

import ctypes
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import psutil
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn

from mgvideo.cli import keys
from mgvideo.cli.app import compose_config
from mgvideo.cli.benchmark import choose_grids, conditions, output, plain_table, show
from mgvideo.cli.build import build_plan
from mgvideo.cli.plan import clip_flops
from mgvideo.cli.progress import ProgressLog
from mgvideo.cli.schema import COMPILE, key
from mgvideo.engine.precision import Precision, choose_precision, probe_convolutions
from mgvideo.engine.train_step import compile_model
from mgvideo.layers.batchnorm import convert_group_batchnorm, deferred_running_stats, set_bn_groups
from mgvideo.plan.forecast import cost
from mgvideo.plan.plan import Grid, Plan, require
from mgvideo.plan.schedules import baseline_of

REFERENCE = "fp32/contiguous/off"
SETTLING, FEW_FAULTS = 6, 1000  # steps at most until one is not slowed by so many new pages of memory
TRAINING = 3  # forward passes that a forward and a backward cost


@dataclass
class Keys:
    """What this program takes besides the keys of a run."""

    models: list[str] = key([], "of configs/model; none: the run's")
    grids: list[str] = key([], "such as 8x112,32x224; none: all of the plan's")
    variants: list[str] = key(
        [REFERENCE, "auto/channels_last/off"],
        "precision/memory format/compilation[/BN groups]; the first is what the others are compared with",
    )
    emulated: bool = key(
        False, "measure variants in bf16 on a CPU without bf16 instructions too, several times as slow"
    )
    clips: int = key(4, "clips of the base grid in a step; a smaller grid has as many more as its volume allows")
    batch: int | None = key(None, "instead: clips in a step, the same at every grid")
    seconds: float = key(3.0, "to measure each cell, in each round; one step at least")
    rounds: int = key(2, "times round all of them, so that a change of the machine's load meets all alike")
    format: str = key("table", "table or json, which mgvideo plan benchmark=… reads")
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass
class Cell:
    """A grid's steps under one variant."""

    clips: int
    flops: float  # of a step's multiplications and additions
    warm_up: float = 0.0  # seconds of the first step
    times: list[float] = field(default_factory=list)
    memory: float = 0.0  # bytes at the peak, beyond weights and what else was there before

    @property
    def seconds(self) -> float:
        """The median step."""
        return sorted(self.times)[len(self.times) // 2]


@dataclass(frozen=True)
class Variant:
    """How a network runs."""

    name: str
    precision: Precision
    compile: str
    bn_groups: int = 1  # of clips


class Bench:
    """A network with an optimizer, ready for bare training steps."""

    def __init__(self, model: nn.Module, variant: Variant, plan: Plan) -> None:
        self.variant, self.device = variant, variant.precision.device
        self.model = variant.precision.place(convert_group_batchnorm(model)).train()
        self.forward = self.model if variant.compile == "off" else compile_model(self.model, variant.compile, plan)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-4, momentum=0.9, nesterov=True, fused=True)

    def step(self, clips: Tensor, labels: Tensor) -> None:
        """Forward, backward, optimizer; returns when the device has done it."""
        self.optimizer.zero_grad(set_to_none=True)
        with deferred_running_stats(self.model), self.variant.precision.autocast():
            logits = self.forward(clips)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, grid: Grid, cell: Cell, seconds: float) -> None:
        """Add steps to a cell; the first of all is its warm-up."""
        set_bn_groups(self.model, math.gcd(self.variant.bn_groups, cell.clips))
        shape = (cell.clips, grid.frames, grid.size, grid.size, 3)
        # permuted frames are channels_last_3d already, as from the loader; the other variant pays for its copy
        clips = torch.randn(shape, device=self.device).permute(0, 4, 1, 2, 3)
        if not self.variant.precision.channels_last:
            clips = clips.contiguous()
        labels = torch.zeros(cell.clips, dtype=torch.int64, device=self.device)
        begun = time.perf_counter()
        self.step(clips, labels)
        cell.warm_up = cell.warm_up or time.perf_counter() - begun
        watch = PeakMemory(self.device)
        for _ in range(SETTLING):  # takes back what that gave to the system
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            self.step(clips, labels)
            if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < FEW_FAULTS:
                break
        begun = time.perf_counter()
        while not cell.times or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            self.step(clips, labels)
            cell.times.append(time.perf_counter() - start)
        cell.memory = max(cell.memory, watch.bytes())


class PeakMemory:
    """Memory at its highest since this was made, beyond what was held then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier steps freed goes back first
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # the kernel forgets the process's peak
            file.write("5")
        self.before = psutil.Process().memory_info().rss

    def bytes(self) -> float:
        """Read it."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1]) - self.before


def read_keys(overrides: Sequence[str]) -> Keys:
    """This program's own keys. Raises UserError where a value is of no use."""
    given = keys.read(Keys, overrides)
    require(given.format in ("table", "json"), f"format={given.format}: choose table or json")
    require(given.seconds > 0, f"seconds={given.seconds}: give a number above 0")
    for name in ("rounds", "clips"):
        require(getattr(given, name) >= 1, f"{name}={getattr(given, name)}: give a whole number from 1 up")
    require(given.batch is None or given.batch >= 1, f"batch={given.batch}: give a whole number from 1 up")
    require(bool(given.variants), f"variants=[]: give some, such as {REFERENCE}")
    for name in given.variants:
        parts = [*name.split("/"), "1"]
        valid = len(parts) in (4, 5) and parts[1] in ("contiguous", "channels_last") and parts[2] in COMPILE
        valid = valid and parts[3].isdecimal() and int(parts[3]) >= 1
        form = f"precision/contiguous or channels_last/{' or '.join(COMPILE)}, and /BN groups if more than 1"
        require(valid, f"variants={name}: write {form}")
    return given


def variant(name: str, device: torch.device) -> Variant:
    """Read `precision/memory format/compilation[/BN groups]`."""
    precision, layout, mode, *groups = name.split("/")
    chosen = replace(choose_precision(precision, device), channels_last=layout == "channels_last")
    return Variant(name, chosen, mode, *map(int, groups))


def without_emulation(variants: Sequence[Variant]) -> list[Variant]:
    """Leave out variants whose bf16 this CPU emulates, and say so.

    Raises:
        UserError: none is left.
    """
    names = [v.name for v in variants if v.precision.warning]
    if names:
        reason = "this CPU does not train in bf16 instructions; emulated=true measures it all the same"
        require(len(names) < len(variants), f"variants={','.join(names)}: {reason}")
        print(f"left out: {', '.join(names)}: {reason}", file=sys.stderr)
    return [v for v in variants if v.name not in names]


def run(given: Keys, cfg: DictConfig) -> None:
    """Measure and report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as a run has it
    plan = build_plan(cfg, 1000 * cfg.base.batch_size)
    grids = choose_grids(plan, given.grids)
    variants = [variant(name, device) for name in given.variants]
    if not given.emulated:
        variants = without_emulation(variants)
    about = {**conditions(device), "threads": torch.get_num_threads()}
    own = cfg.model._target_.rpartition(".")[2]
    models = {name: compose_config("run", [f"model={name}", "output_dir=none"]) for name in given.models}
    cells = {name: measure(given, model, plan, grids, variants) for name, model in (models or {own: cfg}).items()}
    peaks = {v.name: peak(v.precision) for v in variants}
    with output(given.out) as file:
        if given.format == "json":
            print(json.dumps(as_json(given, plan, cells, peaks, about), indent=1), file=file)
        else:
            tables = [table(f"{model}, {v}", rows, peaks[v], rows_of) for model, rows_of in cells.items()
                      for v, rows in rows_of.items()]  # fmt: skip
            show(file, about, [*tables, *saving_tables(plan, cells)])


def measure(
    given: Keys, cfg: DictConfig, plan: Plan, grids: Sequence[Grid], variants: Sequence[Variant]
) -> dict[str, dict[str, Cell]]:
    """Cells by variant and grid, of one model; all variants take turns."""
    macs = clip_flops(cfg)
    volume = plan.base.num_frames * plan.base.crop_size**2
    benches: dict[str, Bench] = {}
    cells: dict[str, dict[str, Cell]] = {}
    for v in variants:
        torch.manual_seed(0)
        benches[v.name] = Bench(instantiate(cfg.model), v, plan)
        faults = probe_convolutions(benches[v.name].model, grids, v.precision)
        for fault in (*faults.wrong, *faults.slow):
            print(f"warning: torch {torch.__version__} in {v.precision}: {fault}", file=sys.stderr)
        cells[v.name] = {}
        for grid in grids:
            clips = given.batch or max(1, round(given.clips * volume / grid.volume))
            cells[v.name][grid.name] = Cell(clips, TRAINING * 2 * macs(grid) * clips)
    with ProgressLog("benchmark") as progress:
        total, done = given.rounds * len(grids) * len(variants), 0
        for _ in range(given.rounds):
            for grid in grids:
                for v in variants:
                    benches[v.name].measure(grid, cells[v.name][grid.name], given.seconds)
                    done += 1
                    progress(done, total)
    return cells


def peak(precision: Precision, seconds: float = 1.0) -> float:
    """FLOPs a second of a large matrix product in the same precision; on a GPU float32 is TF32, as in convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    largest = 8192 if precision.device.type == "cuda" else 2048
    n = largest // 16
    while n < largest and _product_seconds(n, precision) < seconds / 10:  # where bf16 is emulated, a small one does
        n *= 2
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < seconds:
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


def table(title: str, rows: dict[str, Cell], peak_flops: float, all_rows: dict[str, dict[str, Cell]]) -> Table:
    """A row a grid. × reference: how much faster than the first variant; per FLOP: time over the largest grid's."""
    shown = plain_table(
        title, "grid", "clips", "ms", "clips/s", "TFLOP/s", "of peak", "× reference", "per FLOP", "first ms", "MiB",
        "of base",
    )  # fmt: skip
    reference = next(iter(all_rows.values()))
    base = rows[list(rows)[-1]]
    for name, cell in rows.items():
        rate = cell.flops / cell.seconds
        shown.add_row(
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
    return shown


def saving(plan: Plan, rows: dict[str, Cell]) -> float | None:
    """Compute time of the baseline over the plan's, from measured clips; None where a grid was not measured."""
    if not {slot.grid.name for phase in plan.phases for slot in phase.slots} <= rows.keys():
        return None
    times = {name: cell.seconds / cell.clips for name, cell in rows.items()}
    return cost(baseline_of(plan).phases, lambda g: times[g.name]) / cost(plan.phases, lambda g: times[g.name])


def saving_tables(plan: Plan, cells: dict[str, dict[str, dict[str, Cell]]]) -> list[Table]:
    """What the plan saves of the baseline's computing time, beside its steps."""
    shown = plain_table(f"{plan.schedule} over the baseline", "model, variant", "time saved", "steps saved")
    steps = baseline_of(plan).steps / plan.steps
    for model, variants in cells.items():
        for name, rows in variants.items():
            found = saving(plan, rows)
            if found:
                shown.add_row(f"{model}, {name}", f"{found:.2f}×", f"{steps:.2f}×")
    return [shown] if shown.rows else []


def as_json(
    given: Keys, plan: Plan, cells: dict[str, dict[str, dict[str, Cell]]], peaks: dict[str, float], about: dict
) -> dict[str, Any]:
    """What `forecast.read_benchmark` reads (the first model under the last variant), and all cells."""
    first = list(next(iter(cells.values())).values())[-1]
    return {
        "step_seconds": {name: cell.seconds for name, cell in first.items()},
        "step_clips": {name: cell.clips for name, cell in first.items()},
        "conditions": about,
        "keys": asdict(given),
        "peak_flops": peaks,
        "rows": [
            {"model": model, "variant": v, "grid": name, **asdict(cell), "seconds": cell.seconds}
            for model, variants in cells.items()
            for v, rows in variants.items()
            for name, cell in rows.items()
        ],
        "time_saved": {
            f"{m}, {v}": saving(plan, rows) for m, variants in cells.items() for v, rows in variants.items()
        },
    }
