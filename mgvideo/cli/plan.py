"""`mgvideo plan`: what a run would do, before it is paid for; needs neither the videos nor a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TextIO

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mgvideo.errors import UserError
from mgvideo.plan.forecast import Benchmark, predict_phase_times, read_benchmark, suggest_loader_changes
from mgvideo.plan.json_format import plan_to_json
from mgvideo.plan.plan import Grid, Plan, require
from mgvideo.plan.schedules import Schedule, baseline_of, make_plan
from mgvideo.plan.shards import check_shards
from mgvideo.plan.table import make_loader_demand_table, make_plan_table

from . import app, keys
from .build import build_plan, require_dataset_keys, unset_dataset_key
from .schema import key

GPUS = 8  # to plan for where this machine has none: those of the published recipes


@dataclass
class PlanKeys:
    """What this program takes besides the keys of a run."""

    gpus: int | None = key(None, "GPUs to plan for; null: those of this machine, 8 where it has none")
    format: str = key("table", "table, json or png")
    out: str | None = key(None, "file to write to; null: the terminal")
    at: list[float] = key([], "epochs at which json gives the LR")
    videos: int | None = key(None, "training videos; null: as listed, or as published where dataset.root is not set")
    step_time: float | None = key(None, "seconds of a training step: says what the loaders must deliver")
    benchmark: str | None = key(None, "JSON of measured step times and loader rates: predicts time and waiting")


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo plan` and tools/plan.py."""
    own, rest = keys.split(PlanKeys, arguments)
    with app.exit_on_user_error():
        given = read_keys(own)
    app.main("run", _description(), partial(show, given), rest, keys.names(PlanKeys))


def _description() -> str:
    intro = "Show the plan of a run before paying for it. Takes the groups and keys of a run, and:"
    return "\n".join([intro, "", *keys.describe(PlanKeys)])


def read_keys(overrides: Sequence[str]) -> PlanKeys:
    """This program's own keys. Raises UserError where a value is of no use."""
    given = keys.read(PlanKeys, overrides)
    require(given.gpus is None or given.gpus >= 1, f"gpus={given.gpus}: give a whole number from 1 up")
    require(given.format in ("table", "json", "png"), f"format={given.format}: choose table, json or png")
    require(given.format != "png" or given.out is not None, "format=png needs a file: add out=plan.png")
    require(given.videos is None or given.videos >= 1, f"videos={given.videos}: give a whole number from 1 up")
    require(given.step_time is None or given.step_time > 0, f"step_time={given.step_time}: give seconds above 0")
    require(given.step_time is None or given.benchmark is None, "give step_time or benchmark, not both")
    return given


def show(given: PlanKeys, cfg: DictConfig) -> None:
    """Print or draw the plan that a config composes."""
    plan = _plan(given, cfg)
    gpus, notes = (given.gpus, ()) if given.gpus is not None else _gpus_of_this_machine(plan)
    plan = replace(plan, notes=(*plan.notes, *notes))
    try:
        if given.format == "png":
            from mgvideo.plan.figure import draw_plans  # imports matplotlib

            draw_plans(variants(plan, instantiate(cfg.schedule)), str(given.out))
            _print_notes(plan, sys.stdout)
        elif given.out is not None:
            with open(given.out, "w", encoding="utf-8") as file:
                write(given, gpus, cfg, plan, file)
        else:
            write(given, gpus, cfg, plan, sys.stdout)
    except OSError as error:
        raise UserError(f"cannot write out={given.out}: {error.strerror}") from error


def _plan(given: PlanKeys, cfg: DictConfig) -> Plan:
    if given.videos is not None:
        return build_plan(cfg, given.videos)
    try:
        videos, notes = train_videos(cfg)
    except UserError as error:
        raise UserError(f"{error}; or add videos=N to plan without the dataset") from error
    plan = build_plan(cfg, videos)
    return replace(plan, notes=(*plan.notes, *notes))


def _gpus_of_this_machine(plan: Plan) -> tuple[int, tuple[str, ...]]:
    """How many GPUs there are, or the default where there is none, and a note that says which."""
    available = torch.cuda.device_count()
    gpus = available or GPUS
    try:
        check_shards(plan, gpus)
    except UserError as error:
        raise UserError(f"{error}; or add gpus=N to plan for another number") from error
    number = f"{gpus} GPU{'s' * (gpus > 1)}"
    chosen = f"the {number} of this machine" if available else f"{number}, as this machine has none"
    return gpus, (f"planned for {chosen}; gpus=N sets the number",)


def write(given: PlanKeys, gpus: int, cfg: DictConfig, plan: Plan, file: TextIO) -> None:
    """Write the plan as a table or as JSON."""
    benchmark = _benchmark(given, plan)
    times = predict_phase_times(plan, gpus, benchmark) if benchmark else None
    if given.format == "json":
        print(json.dumps(plan_to_json(plan, gpus, given.at, clip_flops(cfg), times), indent=1), file=file)
        return
    console = Console(file=file, soft_wrap=True, highlight=False, markup=False)
    console.print(make_plan_table(plan, gpus, clip_flops(cfg), times))
    _print_notes(plan, file)
    if benchmark and times:
        console.print(make_loader_demand_table(plan, gpus, benchmark))
        for remedy in suggest_loader_changes(plan, times, benchmark.workers):
            console.print(remedy)


def _print_notes(plan: Plan, file: TextIO) -> None:
    for note in plan.notes:
        print(f"note: {note}", file=file)


def _benchmark(given: PlanKeys, plan: Plan) -> Benchmark | None:
    if given.benchmark is not None:
        return read_benchmark(given.benchmark)
    if given.step_time is None:
        return None
    return Benchmark({slot.grid.name: given.step_time for phase in plan.phases for slot in phase.slots})


def variants(plan: Plan, schedule: Schedule) -> list[Plan]:
    """The recipe's baseline, then each cycle alone, then both."""
    cycles = (("short", False, True), ("long", True, False), ("multigrid", True, True))
    schedules = (replace(schedule, name=name, long=long, short=short) for name, long, short in cycles)
    return [baseline_of(plan), *(make_plan(plan.base, each, plan.dataset_size) for each in schedules)]


def train_videos(cfg: DictConfig) -> tuple[int, tuple[str, ...]]:
    """How many videos the dataset trains on, and a note where the number is the published one.

    The published number, `dataset.train_videos`, counts only where a key of the dataset, such as dataset.root, is not
    set: a wrong root is an error. A dataset that is made on first use has as many as its config states.

    Raises:
        UserError: the dataset cannot be read, or its root is not set and no number is published.
    """
    stated, unset = cfg.dataset.get("train_videos"), unset_dataset_key(cfg)
    valid = stated is None or (isinstance(stated, int) and stated >= 1)
    require(valid, f"dataset.train_videos={stated}: give a whole number from 1 up")
    if stated is not None and "prepare" in cfg.dataset:
        return stated, ()
    if stated is not None and unset is not None:
        return stated, (f"planned for the published {stated:,} training videos, as {unset} is not set",)
    require_dataset_keys(cfg)
    try:
        return len(instantiate(cfg.dataset.train, decoder=None)), ()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(app.explain(error))) from error


def clip_flops(cfg: DictConfig) -> Callable[[Grid], float]:
    """Multiply-adds of a clip's forward pass, by grid; counted on shapes alone, so no weights and no memory."""
    if cfg.dataset.num_classes is None:
        OmegaConf.update(cfg, "dataset.num_classes", 400, force_add=True)  # a classifier's size hardly counts
    flops = _model_flops(OmegaConf.to_yaml(cfg.model, resolve=True))
    return lambda grid: flops(grid.frames, grid.size)


@cache  # the cells of a table mostly train the same network
def _model_flops(model_config: str) -> Callable[[int, int], float]:
    with torch.device("meta"):
        model: nn.Module = instantiate(OmegaConf.create(model_config))
    model.eval()

    @cache
    def flops(frames: int, size: int) -> float:
        clip = torch.empty(1, 3, frames, size, size, device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(clip)
        return counter.get_total_flops() / 2

    return flops
