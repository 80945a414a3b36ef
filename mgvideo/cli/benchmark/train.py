"""`mgvideo benchmark train`: compare the trainer with a minimal loop, and multigrid with the baseline."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from mgvideo.cli import keys
from mgvideo.cli.benchmark import (
    ResultLog,
    measurement_conditions,
    open_report,
    plain_table,
    print_report,
    steps_replaced,
)
from mgvideo.cli.build import Data, build_data, build_model, build_plan
from mgvideo.cli.recipe import sample_size
from mgvideo.cli.run import build_trainer
from mgvideo.cli.schema import key
from mgvideo.distributed.watchdog import Position
from mgvideo.engine.micro_batches import split_into_micro_batches
from mgvideo.engine.precision import choose_precision, is_worth_tuning
from mgvideo.engine.trainer import Trainer
from mgvideo.layers.batchnorm import deferred_running_stats, set_bn_groups
from mgvideo.loading.loader import Batch, Loader
from mgvideo.loading.requests import BatchRequest
from mgvideo.plan.plan import Plan
from mgvideo.plan.schedules import baseline_of
from mgvideo.plan.shards import shard_batch
from mgvideo.storage.checkpoints import Checkpoints
from mgvideo.tracking.run_logger import RunLogger


@dataclass
class Keys:
    """Keys of this program, besides the keys of a run."""

    visits: int = key(
        4, "steps to measure of each slot of each phase; the baseline is measured before and after", least=1
    )
    format: str = key("table", "table or json", choices=("table", "json"))
    out: str | None = key(None, "file to write to; null: the terminal")


MEASUREMENTS = 3  # of a schedule: with the loader, without loading, in a minimal loop


@dataclass
class SlotTimes:
    """Seconds of the steps of one slot of one phase."""

    loaded: list[float] = field(default_factory=list)  # in the trainer, from the end of one step to the end of the next
    waited: list[float] = field(default_factory=list)  # of that, waiting for the loader
    held: list[float] = field(default_factory=list)  # in the trainer, on a batch that is already in memory
    bare: list[float] = field(default_factory=list)  # in a minimal loop on that batch

    def figures(self) -> dict[str, float]:
        """Return the medians by field."""
        return {name: median(values) for name, values in vars(self).items()}


@dataclass
class MeasuredRun:
    """Times of a schedule's slots, by (phase, slot), and extra seconds of the first step after each boundary."""

    plan: Plan
    slots: dict[tuple[int, int], SlotTimes]
    boundaries: list[float]

    def merge(self, other: MeasuredRun) -> MeasuredRun:
        """Return these measurements together with those of another run of the same plan."""
        slots = {
            index: SlotTimes(*(a + b for a, b in zip(vars(first).values(), vars(second).values(), strict=True)))
            for (index, first), second in zip(self.slots.items(), other.slots.values(), strict=True)
        }
        return MeasuredRun(self.plan, slots, self.boundaries + other.boundaries)

    def seconds(self, kind: str = "loaded") -> float:
        """Estimate the training time of the whole plan from the medians of its slots."""
        return _whole(self.plan, self.slots, kind)


class RepeatedBatches(Loader):
    """Return the first batch of each slot for all its steps, without loading."""

    def __init__(self, loader: Loader, first_batches: dict[str, Batch]) -> None:
        super().__init__(loader.dataset, loader.options, loader.pin_memory)
        self.first_batches = first_batches

    def load_phases(self, requests: Callable[[int], BatchRequest], phases: Sequence[range]) -> Iterator[Batch]:
        """Yield one batch per step."""
        for steps in phases:
            for step in steps:
                clips, shard = requests(step)
                yield self.first_batches[_slot_name(clips[0].grid.name, len(clips))]._replace(shard=shard)


def read_keys(overrides: Sequence[str]) -> Keys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    return keys.read(Keys, overrides)


def run(options: Keys, cfg: DictConfig) -> None:
    """Measure the schedules and print the report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = build_data(cfg)
    videos = len(data.train)  # a few files may be a sample of a dataset: then plan for 1,000 batches
    plan = build_plan(cfg, videos if videos >= 1000 else sample_size(cfg))
    torch.backends.cudnn.benchmark = is_worth_tuning(plan)  # as in a run
    conditions = {**measurement_conditions(device), "threads": torch.get_num_threads(), "visits": options.visits}
    baseline = baseline_of(plan)
    # measure the baseline before and after, so that a change of the machine's load affects both alike
    plans = [plan] if plan.schedule == "baseline" else [baseline, plan, baseline]
    with ResultLog(MEASUREMENTS * len(plans), options.out) as log:
        runs = [measure_schedule(options, cfg, data, p, log) for p in plans]
        if len(runs) == 3:
            runs = [runs[0].merge(runs[2]), runs[1]]
        with open_report(options.out) as file:
            if options.format == "json":
                print(json.dumps(as_json(options, runs, conditions), indent=1), file=file)
            else:
                print_report(file, conditions, [*map(table, runs), summary(runs)])


def shorten_plan(plan: Plan, visits: int) -> Plan:
    """Return the plan with few steps in each phase: one for the boundary and `visits` for each slot, in turn."""
    phases, step = [], 0
    for phase in plan.phases:
        steps = visits * len(phase.slots) + 1  # the first includes the boundary
        phases.append(replace(phase, steps=(step, step + steps), weights=()))
        step += steps
    return replace(plan, phases=tuple(phases))


def measure_schedule(
    options: Keys, cfg: DictConfig, data: Data, plan: Plan, log: Callable[[str], None] = lambda _: None
) -> MeasuredRun:
    """Train a shortened plan with the loader, then on batches in memory, then in a minimal loop; log each result."""
    short = shorten_plan(plan, options.visits)
    precision = choose_precision(cfg.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    slots = {(p, s): SlotTimes() for p, phase in enumerate(plan.phases) for s in range(len(phase.slots))}
    first_batches: dict[str, Batch] = {}
    with tempfile.TemporaryDirectory() as folder:
        monitor = RunLogger(Path(folder), short, active=False)
        checkpoints = Checkpoints(Path(folder) / "checkpoints", 1)
        trainer = build_trainer(
            cfg, build_model(cfg, precision), short, data, precision, monitor, checkpoints, Position()
        )
        trainer.validate = None
        times = time_steps(trainer, first_batches)
        steps = {
            (p, s): [step for step in range(phase.steps[0] + 1, phase.steps[1]) if phase.slot(step) is slot]
            for p, phase in enumerate(short.phases)
            for s, slot in enumerate(phase.slots)
        }
        for index, slot_times in slots.items():
            slot_times.loaded = [times[step][0] for step in steps[index]]
            slot_times.waited = [times[step][1] for step in steps[index]]
        log(f"{plan.schedule}, with the loader: {_whole(plan, slots, 'loaded'):.0f} s for the run")
        boundaries = [
            times[phase.steps[0]][0] - median(slots[p, 0].loaded) for p, phase in enumerate(short.phases) if p
        ]
        trainer.loader = RepeatedBatches(trainer.loader, first_batches)
        trainer.progress.step = 0
        times = time_steps(trainer, {})
        for index, slot_times in slots.items():
            slot_times.held = [times[step][0] for step in steps[index]]
        log(f"{plan.schedule}, without loading: {_whole(plan, slots, 'held'):.0f} s for the run")
        for (p, s), slot_times in slots.items():
            phase = short.phases[p]
            batch = first_batches[_slot_name(phase.slots[s].grid.name, phase.slots[s].batch)]
            slot_times.bare = time_bare_loop(trainer, batch, phase.bn_groups, options.visits)
        log(f"{plan.schedule}, in a minimal loop: {_whole(plan, slots, 'bare'):.0f} s for the run")
    return MeasuredRun(plan, slots, boundaries)


def _whole(plan: Plan, slots: dict[tuple[int, int], SlotTimes], kind: str) -> float:
    """Return the seconds of all steps of a plan, from the medians of one field of its slots."""
    return sum(
        visits * median(getattr(slots[p, s], kind))
        for p, phase in enumerate(plan.phases)
        for s, visits in enumerate(phase.steps_per_slot())
    )


def _slot_name(grid: str, batch: int) -> str:
    return f"{grid}x{batch}"


def time_steps(trainer: Trainer, first_batches: dict[str, Batch]) -> list[tuple[float, float]]:
    """Train a whole plan and time its steps. Puts the first batch of each slot into `first_batches`.

    Returns:
        For each step, seconds since the end of the previous step, and seconds of waiting for data.
    """
    original, marks, waits = trainer.train_step, [time_mark(trainer.device)], []
    metrics, waited = trainer.running_metrics, 0.0

    def train_step(number: int, batch: Batch) -> Tensor:
        nonlocal metrics, waited
        slot = trainer.plan.slot(number)
        first_batches.setdefault(_slot_name(slot.grid.name, slot.batch), batch)
        before, metrics = metrics, trainer.running_metrics  # a log step replaces it
        waits.append(metrics.wait_s - (waited if metrics is before else 0.0))
        waited = metrics.wait_s
        loss = original(number, batch)
        marks.append(time_mark(trainer.device))
        return loss

    with steps_replaced(trainer, train_step):
        trainer.train()
    return list(zip(seconds_between(marks), waits, strict=True))


def time_bare_loop(trainer: Trainer, batch: Batch, groups: int, visits: int) -> list[float]:
    """Return the seconds of the steps of a minimal training loop, all on the same batch.

    A step copies the batch to the device, runs forward and backward for each micro-batch, and steps the optimizer.
    """
    train_step, device, clips = trainer.train_step, trainer.device, len(batch.labels)
    model, plan, grid = train_step.model.train(), train_step.plan, batch.clips.shape[1:4].numel()
    limit = max(1, train_step.micro_batch_clips * plan.base.num_frames * plan.base.crop_size**2 // grid)
    micro_batches = split_into_micro_batches(shard_batch(clips, groups, 0, 1), limit)
    marks = []
    for _ in range(visits + 2):
        marks.append(time_mark(device))
        pixels, labels = batch.clips.to(device), batch.labels.to(device)
        trainer.optimizer.zero_grad(set_to_none=True)
        with deferred_running_stats(model):
            for start, stop, bn_groups in micro_batches:
                set_bn_groups(model, bn_groups)
                with train_step.precision.autocast():
                    logits = train_step.wrapped_model(train_step.normalize(pixels[start:stop]))
                train_step.task.loss(logits.float(), labels[start:stop]).div(clips).backward()
        trainer.optimizer.step()
    return seconds_between(marks)[1:]


def time_mark(device: torch.device) -> Any:
    """Return a point in time: a CUDA event, which does not make this process wait, or seconds on the CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: Sequence[Any]) -> list[float]:
    """Return the seconds from each time mark to the next."""
    if isinstance(marks[0], float):
        return [b - a for a, b in pairwise(marks)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]


def table(run: MeasuredRun) -> Table:
    """Return a table with a row for each slot of each phase."""
    columns = ("slot", "batch", "ms", "clips/s", "waiting", "minimal ms", "trainer overhead", "loader overhead")
    report = plain_table(f"{run.plan.schedule}: a step", *columns)
    for (p, s), slot_times in run.slots.items():
        slot, figures = run.plan.phases[p].slots[s], slot_times.figures()
        loaded, held, minimal = figures["loaded"], figures["held"], figures["bare"]
        report.add_row(
            f"{p + 1}. {slot.grid.name}",
            str(slot.batch),
            f"{1000 * loaded:.0f}",
            f"{slot.batch / loaded:.1f}",
            f"{figures['waited'] / loaded:.1%}",
            f"{1000 * minimal:.0f}",
            f"{held / minimal - 1:+.1%}",
            f"{loaded / held - 1:+.1%}",
        )
    return report


def summary(runs: Sequence[MeasuredRun]) -> Table:
    """Return a table of whole runs: steps, time, cost of a boundary, and what the schedule saves."""
    report = plain_table(
        "whole runs, from the medians", "schedule", "steps", "training", "without loading", "per boundary"
    )
    for run in runs:
        cost = f"{median(run.boundaries):+.2f} s" if run.boundaries else "–"
        loaded, held = run.seconds(), run.seconds("held")
        report.add_row(run.plan.schedule, str(run.plan.steps), f"{loaded:.0f} s", f"{held:.0f} s", cost)
    if len(runs) == 2:
        saved = [runs[0].plan.steps / runs[1].plan.steps, *(runs[0].seconds(k) / runs[1].seconds(k) for k in KINDS)]
        report.add_row("saving", *(f"{value:.2f}×" for value in saved), "")
    return report


KINDS = ("loaded", "held")


def as_json(options: Keys, runs: Sequence[MeasuredRun], conditions: dict[str, Any]) -> dict[str, Any]:
    """Return all measurements as JSON."""
    return {
        "conditions": conditions,
        "keys": asdict(options),
        "runs": [
            {
                "schedule": run.plan.schedule,
                "steps": run.plan.steps,
                "seconds": {kind: run.seconds(kind) for kind in KINDS},
                "boundaries": run.boundaries,
                "slots": [
                    {
                        "phase": p + 1,
                        "grid": run.plan.phases[p].slots[s].grid.name,
                        "batch": run.plan.phases[p].slots[s].batch,
                        **slot_times.figures(),
                    }
                    for (p, s), slot_times in run.slots.items()
                ],
            }
            for run in runs
        ],
    }
