"""`mgvideo benchmark train`: the trainer itself, beside a bare loop, and multigrid beside the baseline."""

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

from mgvideo.cli import keys
from mgvideo.cli.benchmark import conditions, output, plain_table, show
from mgvideo.cli.build import Data, build_data, build_model, build_plan
from mgvideo.cli.run import build_trainer
from mgvideo.cli.schema import key
from mgvideo.engine.micro_batches import split_into_micro_batches
from mgvideo.engine.precision import choose_precision
from mgvideo.engine.trainer import Trainer
from mgvideo.layers.batchnorm import deferred_running_stats, set_bn_groups
from mgvideo.loading.loader import Batch, Loader
from mgvideo.loading.requests import BatchRequest
from mgvideo.plan.plan import Plan, require
from mgvideo.plan.schedules import baseline_of
from mgvideo.plan.shards import shard_batch
from mgvideo.storage.checkpoints import Checkpoints
from mgvideo.tracking.run_logger import RunLogger


@dataclass
class Keys:
    """What this program takes besides the keys of a run."""

    visits: int = key(4, "steps to measure of each slot of each phase; the baseline's twice, before and after")
    format: str = key("table", "table or json")
    out: str | None = key(None, "file to write to; null: the terminal")


@dataclass
class Visited:
    """Seconds of the steps of one slot of one phase."""

    loaded: list[float] = field(default_factory=list)  # in the trainer, from one step's end to the next
    waited: list[float] = field(default_factory=list)  # of that, for the loader
    held: list[float] = field(default_factory=list)  # in the trainer, on a batch that is there already
    bare: list[float] = field(default_factory=list)  # the bare loop on that batch

    def figures(self) -> dict[str, float]:
        """Medians."""
        return {name: median(values) for name, values in vars(self).items()}


@dataclass
class Run:
    """A schedule's slots as measured, by phase and slot, and what its phase boundaries took beyond a step."""

    plan: Plan
    slots: dict[tuple[int, int], Visited]
    boundaries: list[float]

    def joined(self, other: Run) -> Run:
        """With what was measured at another time."""
        slots = {
            place: Visited(*(a + b for a, b in zip(vars(mine).values(), vars(theirs).values(), strict=True)))
            for (place, mine), theirs in zip(self.slots.items(), other.slots.values(), strict=True)
        }
        return Run(self.plan, slots, self.boundaries + other.boundaries)

    def seconds(self, kind: str = "loaded") -> float:
        """The whole plan's training time from the slots' medians."""
        return sum(
            visits * self.slots[p, s].figures()[kind]
            for p, phase in enumerate(self.plan.phases)
            for s, visits in enumerate(phase.visits())
        )


class HeldBatches(Loader):
    """Gives the first batch of each slot again and again, without loading anything."""

    def __init__(self, loader: Loader, held: dict[str, Batch]) -> None:
        super().__init__(loader.dataset, loader.options, loader.pin)
        self.held = held

    def phases(self, requests: Callable[[int], BatchRequest], stretches: Sequence[range]) -> Iterator[Batch]:
        """Yield one batch a step."""
        for steps in stretches:
            for step in steps:
                clips, shard = requests(step)
                yield self.held[_name(clips[0].grid.name, len(clips))]._replace(shard=shard)


def read_keys(overrides: Sequence[str]) -> Keys:
    """This program's own keys. Raises UserError where a value is of no use."""
    given = keys.read(Keys, overrides)
    require(given.format in ("table", "json"), f"format={given.format}: choose table or json")
    require(given.visits >= 1, f"visits={given.visits}: give a whole number from 1 up")
    return given


def run(given: Keys, cfg: DictConfig) -> None:
    """Measure and report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as a run has it
    data = build_data(cfg)
    videos = len(data.train)  # a few may stand for a dataset: the plan is then a long one
    plan = build_plan(cfg, videos if videos >= 1000 else 1000 * cfg.base.batch_size)
    about = {**conditions(device), "threads": torch.get_num_threads(), "visits": given.visits}
    if plan.schedule == "baseline":
        runs = [measure(given, cfg, data, plan)]
    else:  # the baseline before and after, so that a change of the machine's load meets both alike
        before, own, after = (measure(given, cfg, data, each) for each in (baseline_of(plan), plan, baseline_of(plan)))
        runs = [before.joined(after), own]
    with output(given.out) as file:
        if given.format == "json":
            print(json.dumps(as_json(given, runs, about), indent=1), file=file)
        else:
            show(file, about, [*map(table, runs), summary(runs)])


def shortened(plan: Plan, visits: int) -> Plan:
    """The same phases with few steps each."""
    phases, step = [], 0
    for phase in plan.phases:
        steps = visits * len(phase.slots) + 1  # the first pays for the boundary
        phases.append(replace(phase, steps=(step, step + steps)))
        step += steps
    return replace(plan, phases=tuple(phases))


def measure(given: Keys, cfg: DictConfig, data: Data, plan: Plan) -> Run:
    """Train a shortened plan with the real loader, again on held batches, then in a bare loop."""
    short = shortened(plan, given.visits)
    precision = choose_precision(cfg.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    slots = {(p, s): Visited() for p, phase in enumerate(plan.phases) for s in range(len(phase.slots))}
    held: dict[str, Batch] = {}
    with tempfile.TemporaryDirectory() as folder:
        monitor = RunLogger(Path(folder), short, active=False)
        checkpoints = Checkpoints(Path(folder) / "checkpoints", 1)
        trainer = build_trainer(cfg, build_model(cfg, precision), short, data, precision, monitor, checkpoints)
        trainer.validate = None
        times = timed(trainer, held)
        steps = {
            (p, s): [step for step in range(phase.steps[0] + 1, phase.steps[1]) if phase.slot(step) is slot]
            for p, phase in enumerate(short.phases)
            for s, slot in enumerate(phase.slots)
        }
        for place, visited in slots.items():
            visited.loaded = [times[step][0] for step in steps[place]]
            visited.waited = [times[step][1] for step in steps[place]]
        boundaries = [
            times[phase.steps[0]][0] - median(slots[p, 0].loaded) for p, phase in enumerate(short.phases) if p
        ]
        trainer.loader = HeldBatches(trainer.loader, held)
        trainer.progress.step = 0
        times = timed(trainer, {})
        for place, visited in slots.items():
            visited.held = [times[step][0] for step in steps[place]]
        for (p, s), visited in slots.items():
            phase = short.phases[p]
            visited.bare = bare(trainer, held[_name(phase.slots[s].grid.name, phase.slots[s].batch)],
                                phase.bn_groups, given.visits)  # fmt: skip
    return Run(plan, slots, boundaries)


def _name(grid: str, batch: int) -> str:
    return f"{grid}x{batch}"


def timed(trainer: Trainer, held: dict[str, Batch]) -> list[tuple[float, float]]:
    """Run a trainer's whole plan: seconds of each step, from the end of the one before, and its wait for data."""
    real, marks, waits = trainer.step, [mark(trainer.device)], []
    metrics, waited = trainer.running_metrics, 0.0

    def step(number: int, batch: Batch) -> None:
        nonlocal metrics, waited
        slot = trainer.plan.slot(number)
        held.setdefault(_name(slot.grid.name, slot.batch), batch)
        before, metrics = metrics, trainer.running_metrics  # a log step starts a new one
        waits.append(metrics.wait_s - (waited if metrics is before else 0.0))
        waited = metrics.wait_s
        real(number, batch)
        marks.append(mark(trainer.device))

    trainer.step = step  # type: ignore
    try:
        trainer.train()
    finally:
        trainer.step = real  # type: ignore
    return list(zip(between(marks), waits, strict=True))


def bare(trainer: Trainer, batch: Batch, groups: int, visits: int) -> list[float]:
    """Seconds of minimal steps: transfer; normalise, forward, loss and backward by micro-batch; optimizer."""
    model, device, clips = trainer.model.train(), trainer.device, len(batch.labels)
    plan, grid = trainer.plan, batch.clips.shape[1:4].numel()
    limit = max(1, trainer.options.micro_batch_clips * plan.base.num_frames * plan.base.crop_size**2 // grid)
    micro_batches = split_into_micro_batches(shard_batch(clips, groups, 0, 1), limit)
    marks = []
    for _ in range(visits + 2):
        marks.append(mark(device))
        pixels, labels = batch.clips.to(device), batch.labels.to(device)
        trainer.optimizer.zero_grad(set_to_none=True)
        with deferred_running_stats(model):
            for start, stop, bn_groups in micro_batches:
                set_bn_groups(model, bn_groups)
                with trainer.precision.autocast():
                    logits = trainer.train_step.wrapped_model(trainer.normalize(pixels[start:stop]))
                trainer.task.loss(logits.float(), labels[start:stop]).div(clips).backward()
        trainer.optimizer.step()
    return between(marks)[1:]


def mark(device: torch.device) -> Any:
    """A point in time, of the device's where it works beside this process, which need not wait for it then."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(marks: Sequence[Any]) -> list[float]:
    """Seconds from each mark to the next."""
    if isinstance(marks[0], float):
        return [b - a for a, b in pairwise(marks)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]


def table(run: Run) -> Table:
    """A row a slot of a phase."""
    columns = ("slot", "batch", "ms", "clips/s", "waiting", "bare ms", "trainer's own", "loader's part")
    shown = plain_table(f"{run.plan.schedule}: a step", *columns)
    for (p, s), visited in run.slots.items():
        slot, figures = run.plan.phases[p].slots[s], visited.figures()
        loaded, held, least = figures["loaded"], figures["held"], figures["bare"]
        shown.add_row(
            f"{p + 1}. {slot.grid.name}",
            str(slot.batch),
            f"{1000 * loaded:.0f}",
            f"{slot.batch / loaded:.1f}",
            f"{figures['waited'] / loaded:.1%}",
            f"{1000 * least:.0f}",
            f"{held / least - 1:+.1%}",
            f"{loaded / held - 1:+.1%}",
        )
    return shown


def summary(runs: Sequence[Run]) -> Table:
    """What the schedule saves on the clock and in steps, and what boundaries cost."""
    shown = plain_table("whole runs, from the medians", "schedule", "steps", "training", "held batches", "a boundary")
    for run in runs:
        cost = f"{median(run.boundaries):+.2f} s" if run.boundaries else "–"
        loaded, held = run.seconds(), run.seconds("held")
        shown.add_row(run.plan.schedule, str(run.plan.steps), f"{loaded:.0f} s", f"{held:.0f} s", cost)
    if len(runs) == 2:
        saved = [runs[0].plan.steps / runs[1].plan.steps, *(runs[0].seconds(k) / runs[1].seconds(k) for k in KINDS)]
        shown.add_row("saving", *(f"{value:.2f}×" for value in saved), "")
    return shown


KINDS = ("loaded", "held")


def as_json(given: Keys, runs: Sequence[Run], about: dict[str, Any]) -> dict[str, Any]:
    """All of it."""
    return {
        "conditions": about,
        "keys": asdict(given),
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
                        **visited.figures(),
                    }
                    for (p, s), visited in run.slots.items()
                ],
            }
            for run in runs
        ],
    }
