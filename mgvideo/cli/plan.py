"""`mgvideo plan`: print or draw the plan of a run and its cost; requires neither the videos nor a GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from inspect import signature
from typing import Any, TextIO

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
from mgvideo.plan.plan import Base, Grid, Plan, require
from mgvideo.plan.schedules import Schedule, baseline, baseline_of, long, multigrid, short
from mgvideo.plan.shards import check_shards
from mgvideo.plan.table import make_loader_demand_table, make_plan_table
from mgvideo.storage.paths import explain_write_errors

from . import app, keys, recommend
from .build import build_plan, build_schedule, require_dataset_keys, schedule_options, unset_dataset_key
from .resume import resolve_decay_from
from .schema import key

DEFAULT_GPUS = 8  # if this machine has none; the number in the published recipes


@dataclass
class PlanKeys:
    """Keys of this program, besides the keys of a run."""

    gpus: int | None = key(None, "GPUs to plan for; null: those of this machine, or 8 if it has none", least=1)
    format: str = key("table", "table, json or png", choices=("table", "json", "png"))
    out: str | None = key(None, "file to write to; null: the terminal")
    at: list[float] = key([], "epochs at which json gives the LR")
    videos: int | None = key(
        None, "training videos; null: as listed, or as published if dataset.root is not set", least=1
    )
    step_time: float | None = key(None, "seconds of a training step: adds what the loaders must deliver", above=0)
    benchmark: str | None = key(
        None, "JSON of measured step times and loader rates: adds predicted time and waiting; null: schedule.benchmark"
    )
    recommend: bool = key(False, "list all schedules for this recipe and budget instead, and the evidence for them")


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo plan` and tools/plan.py."""
    own_overrides, run_overrides = keys.split(PlanKeys, arguments)
    with app.exit_on_user_error():
        options = read_keys(own_overrides)
    app.main("run", _description(), partial(show, options), run_overrides, keys.names(PlanKeys))


def _description() -> str:
    intro = "Show the plan and the cost of a run before starting it. Takes the groups and keys of a run, and:"
    return "\n".join([intro, "", *keys.describe(PlanKeys)])


def read_keys(overrides: Sequence[str]) -> PlanKeys:
    """Read and check the keys of this program. Raises UserError for an invalid value."""
    options = keys.read(PlanKeys, overrides)
    require(options.format != "png" or options.out is not None, "format=png needs a file: add out=plan.png")
    require(options.step_time is None or options.benchmark is None, "give step_time or benchmark, not both")
    fits = not options.recommend or options.format == "table"
    require(fits, f"recommend=true prints a table: leave out format={options.format}")
    return options


def show(options: PlanKeys, cfg: DictConfig) -> None:
    """Print or draw the plan of a config."""
    if options.benchmark is None and options.step_time is None:
        options.benchmark = cfg.schedule.get("benchmark")
    resolve_decay_from(cfg)
    if "gpus" in cfg.schedule and cfg.schedule.gpus is None:
        cfg.schedule.gpus = options.gpus or torch.cuda.device_count() or DEFAULT_GPUS
    plan = _plan(options, cfg)
    gpus, notes = (options.gpus, ()) if options.gpus is not None else _gpus_of_this_machine(plan)
    plan = replace(plan, notes=(*plan.notes, *notes))
    if options.out is None:
        write(options, gpus, cfg, plan, sys.stdout)
        return
    with explain_write_errors("out", options.out):
        if options.format == "png":
            from mgvideo.plan.figure import draw_plans  # imports matplotlib

            draw_plans(variants(plan, build_schedule(cfg), schedule_options(cfg).apply), options.out)
            _print_notes(plan, sys.stdout)
        else:
            with open(options.out, "w", encoding="utf-8") as file:
                write(options, gpus, cfg, plan, file)


def _plan(options: PlanKeys, cfg: DictConfig) -> Plan:
    if options.videos is not None:
        return build_plan(cfg, options.videos)
    try:
        videos, notes = train_videos(cfg)
    except UserError as error:
        raise UserError(f"{error}; or add videos=N to plan without the dataset") from error
    plan = build_plan(cfg, videos)
    return replace(plan, notes=(*plan.notes, *notes))


def _gpus_of_this_machine(plan: Plan) -> tuple[int, tuple[str, ...]]:
    """Return the number of GPUs of this machine, or `DEFAULT_GPUS` if it has none, and a note about it."""
    available = torch.cuda.device_count()
    gpus = available or DEFAULT_GPUS
    try:
        check_shards(plan, gpus)
    except UserError as error:
        raise UserError(f"{error}; or add gpus=N to plan for another number") from error
    number = f"{gpus} GPU{'s' * (gpus > 1)}"
    chosen = f"the {number} of this machine" if available else f"{number}, as this machine has none"
    return gpus, (f"planned for {chosen}; gpus=N sets the number",)


def write(options: PlanKeys, gpus: int, cfg: DictConfig, plan: Plan, file: TextIO) -> None:
    """Write the plan as a table or as JSON, with predicted times if a benchmark or step time is given."""
    if options.recommend:
        _write_recommendation(options, gpus, cfg, plan, file)
        return
    benchmark = _benchmark(options, plan)
    times = predict_phase_times(plan, gpus, benchmark) if benchmark else None
    if options.format == "json":
        print(json.dumps(plan_to_json(plan, gpus, options.at, clip_flops(cfg), times), indent=1), file=file)
        return
    console = Console(file=file, soft_wrap=True, highlight=False, markup=False)
    console.print(make_plan_table(plan, gpus, clip_flops(cfg), times))
    _print_notes(plan, file)
    if benchmark and times:
        console.print(make_loader_demand_table(plan, gpus, benchmark))
        for remedy in suggest_loader_changes(plan, times, benchmark.workers):
            console.print(remedy)


def _write_recommendation(options: PlanKeys, gpus: int, cfg: DictConfig, plan: Plan, file: TextIO) -> None:
    """Write a table of all schedules for the recipe of a plan, and what is known of them."""
    benchmark = _benchmark(options, plan)
    of_recipe = {"jitter": cfg.recipe.jitter, "round_epochs": cfg.recipe.round_epochs}
    keys = {**of_recipe, **getattr(build_schedule(cfg), "keywords", {})}
    base: Any = OmegaConf.to_container(cfg.base, resolve=True)  # plan.base may have fewer milestones
    found = recommend.candidates(Base(**base), plan.dataset_size, schedule_options(cfg), keys)
    console = Console(file=file, soft_wrap=True, highlight=False, markup=False)
    console.print(recommend.make_candidate_table(found, clip_flops(cfg), gpus, benchmark))
    for line in recommend.advice(found):
        console.print(line)


def _print_notes(plan: Plan, file: TextIO) -> None:
    for note in plan.notes:
        print(f"note: {note}", file=file)


def _benchmark(options: PlanKeys, plan: Plan) -> Benchmark | None:
    if options.benchmark is not None:
        return read_benchmark(options.benchmark)
    if options.step_time is None:
        return None
    return Benchmark({slot.grid.name: options.step_time for phase in plan.phases for slot in phase.slots})


def variants(
    plan: Plan, schedule: Schedule, with_options: Callable[[Schedule], Schedule] = lambda schedule: schedule
) -> list[Plan]:
    """Return the plans to draw below each other, the baseline first.

    For a schedule of the paper these are all four, with the keys and options that they share with it; for another it is
    its own.
    """
    keys = getattr(schedule, "keywords", {})
    if getattr(schedule, "func", schedule) not in (baseline, short, long, multigrid):
        return [baseline_of(plan), plan]
    plans = [baseline_of(plan)]
    for function in (short, long, multigrid):
        shared = keys.keys() & signature(function).parameters.keys() - {"name"}
        same_keys = with_options(partial(function, **{key: keys[key] for key in shared}))
        plans.append(same_keys(plan.base, plan.dataset_size))
    return plans


def train_videos(cfg: DictConfig) -> tuple[int, tuple[str, ...]]:
    """Return the number of training videos, and a note if it is the published number.

    The published number, `dataset.train_videos`, is used only if a key of the dataset, such as `dataset.root`, is not
    set; a wrong root is an error. For a dataset that is generated on first use, it is the number to generate.

    Raises:
        UserError: the dataset cannot be read, or its root is not set and no number is published.
    """
    published, unset = cfg.dataset.get("train_videos"), unset_dataset_key(cfg)
    valid = published is None or (isinstance(published, int) and published >= 1)
    require(valid, f"dataset.train_videos={published}: give a whole number from 1 up")
    if published is not None and "prepare" in cfg.dataset:
        return published, ()
    if published is not None and unset is not None:
        return published, (f"planned for the published {published:,} training videos, as {unset} is not set",)
    require_dataset_keys(cfg)
    try:
        return len(instantiate(cfg.dataset.train, decoder=None)), ()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(app.explain(error))) from error


def clip_flops(cfg: DictConfig) -> Callable[[Grid], float]:
    """Return a function from a grid to the multiply-adds of one clip's forward pass.

    They are counted on the meta device, which needs no weights and no memory.
    """
    if cfg.dataset.num_classes is None:
        OmegaConf.update(
            cfg, "dataset.num_classes", 400, force_add=True
        )  # the classifier's share of the FLOPs is negligible
    flops = _model_flops(OmegaConf.to_yaml(cfg.model, resolve=True))
    return lambda grid: flops(grid.frames, grid.size)


@cache  # most cells of a table train the same network
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
