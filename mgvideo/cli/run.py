"""`mgvideo run`: train a network along its plan, test it on many views, report."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mgvideo.checkpoint import Checkpoints, read_checkpoint, write_atomic
from mgvideo.distributed import joined, rank, world_size
from mgvideo.errors import UserError
from mgvideo.evaluate import Evaluator, Scores, Views
from mgvideo.loader import Loader
from mgvideo.monitor import Monitor
from mgvideo.plan import Grid, Plan
from mgvideo.plan_table import plan_table
from mgvideo.precision import Precision, choose_precision
from mgvideo.report import Report
from mgvideo.schedule import baseline_of
from mgvideo.tasks import SingleLabel
from mgvideo.trainer import Trainer, TrainOptions

from . import app
from .build import Data, build_data, build_model, build_normalize, build_plan, loader_options, max_clips


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo run` and tools/run_net.py."""
    app.main("run", "Train and test a video network along a multigrid plan.", run, arguments)


def run(cfg: DictConfig) -> None:
    """One run from a composed config; on every rank."""
    with joined() as device:
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        data = build_data(cfg)
        plan = build_plan(cfg, len(data.train))
        precision = choose_precision(cfg.precision, device)
        model = build_model(cfg, precision)
        folder = output_folder(cfg, plan)
        checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep)
        state, warnings = resumed(cfg.resume, checkpoints)
        step = state["progress"]["step"] if state else 0
        monitor = Monitor(folder, plan, step, active=rank() == 0)
        try:
            for warning in warnings:
                monitor.say(f"warning: {warning}")
            announce(cfg, monitor, plan, precision)
            trainer = build_trainer(cfg, model, plan, data, precision, monitor, checkpoints)
            if state:
                trainer.load(state)
                monitor.say(f"resumed at step {step} of {plan.steps} from {checkpoints.folder}")
            if cfg.train.enable:
                trainer.train()
            if cfg.test.enable:
                test(cfg, trainer, data, monitor)
        finally:
            monitor.close()


def output_folder(cfg: DictConfig, plan: Plan) -> Path:
    """Make the run's folder, with the composed config and the plan in it."""
    folder = Path(cfg.output_dir)
    if rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make output_dir={folder}: {error.strerror}") from error
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        write_atomic(folder / "plan.json", json.dumps(plan.to_json(), indent=1).encode())
    return folder


def resumed(resume: str, checkpoints: Checkpoints) -> tuple[dict | None, list[str]]:
    """The state to go on from, and warnings about checkpoints that were passed over."""
    if resume == "auto":
        return checkpoints.newest()
    if resume == "never":
        return None, []
    return read_checkpoint(Path(resume)), []


def announce(cfg: DictConfig, monitor: Monitor, plan: Plan, precision: Precision) -> None:
    """The first screen: what will happen."""
    choices: Any = HydraConfig.get().runtime.choices
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    monitor.say(f"{choices.model} on {choices.dataset}, schedule {plan.schedule}{ranks}; run folder {cfg.output_dir}")
    monitor.show(plan_table(plan, gpus=world_size()))
    for note in plan.notes:
        monitor.say(f"note: {note}")
    monitor.say(f"precision: {precision}")


def build_trainer(
    cfg: DictConfig,
    model: nn.Module,
    plan: Plan,
    data: Data,
    precision: Precision,
    monitor: Monitor,
    checkpoints: Checkpoints,
) -> Trainer:
    """The trainer, its optimizer and its validation."""
    options = loader_options(cfg)
    pin = precision.device.type == "cuda"
    normalize = build_normalize(cfg, precision)
    fits = max_clips(cfg, model, plan, precision)
    largest = max(slot.batch * slot.grid.volume for phase in plan.phases for slot in phase.slots)
    base_volume = plan.base.frames * plan.base.size**2
    if fits * base_volume * world_size() < largest:
        monitor.say(f"memory holds {fits} clips of the base grid at once: larger steps run in micro-batches")
    base = plan.base
    side = base.size
    views = Views(Grid(base.frames, side, (base.stride, base.stride), (side, side)))
    evaluator = Evaluator(Loader(data.val, options, pin), data.task, data.classes, normalize, precision, cfg.test.batch)
    return Trainer(
        model,
        plan,
        data.task,
        instantiate(cfg.optimizer, model, lr=base.lr),
        Loader(data.train, options, pin),
        seed=cfg.seed,
        normalize=normalize,
        precision=precision,
        options=TrainOptions(
            max_clips=fits,
            log_every=cfg.train.log_every,
            evals_per_phase=cfg.train.evals_per_phase,
            precise_bn_batches=cfg.train.precise_bn_batches,
            checkpoint_every=cfg.checkpoint.every_steps,
            max_bad_fraction=cfg.dataset.max_bad_fraction,
        ),
        monitor=monitor,
        checkpoints=checkpoints,
        validate=(evaluator, views) if cfg.train.evals_per_phase else None,
    )


def test(cfg: DictConfig, trainer: Trainer, data: Data, monitor: Monitor) -> None:
    """Multi-view test of the model as it is, then the report."""
    base, size = trainer.plan.base, cfg.test.size
    views = Views(Grid(base.frames, size, (base.stride, base.stride), (size, size)), cfg.test.clips, cfg.test.crops)
    loader = Loader(data.val, trainer.loader.options, trainer.loader.pin)
    evaluator = Evaluator(loader, data.task, data.classes, trainer.normalize, trainer.precision, cfg.test.batch)
    started = time.perf_counter()
    monitor.say(f"testing {len(data.val)} videos, {views.clips} clips × {views.crops} crops")
    result = evaluator(trainer.model, views)
    metrics = data.task.metrics(result.scores, result.labels)
    if rank() != 0:
        return
    if result.failures:
        monitor.failures(trainer.progress.step, result.failures)
    record_test(trainer, data, monitor, result, metrics)
    choices: Any = HydraConfig.get().runtime.choices
    report = Report(
        name=f"{choices.model} on {choices.dataset}, {trainer.plan.schedule}",
        plan=trainer.plan,
        baseline_steps=baseline_of(trainer.plan).steps,
        hardware=hardware(trainer.precision.device),
        precision=str(trainer.precision),
        train_seconds=trainer.progress.seconds,
        test_seconds=time.perf_counter() - started,
        metrics=metrics,
        views=f"{views.clips}×{views.crops}",
        videos=len(data.val),
        failures=result.failures,
        folder=monitor.folder,
    )
    report.write()
    monitor.say("\n" + report.markdown())


def record_test(trainer: Trainer, data: Data, monitor: Monitor, result: Scores, metrics: dict[str, float]) -> None:
    """The test in TensorBoard and test.json."""
    step = trainer.progress.step
    for name, value in metrics.items():
        monitor.board.add_scalar(f"test/{name}", value, step)
    if isinstance(data.task, SingleLabel):
        confusion = data.task.confusion(result.scores, result.labels).float()
        shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
        monitor.board.add_image("test/confusion", 1 - shares, step, dataformats="HW")
    write_atomic(monitor.folder / "test.json", json.dumps({"step": step, **metrics}).encode())


def hardware(device: torch.device) -> str:
    """What the run ran on, in words."""
    if device.type == "cuda":
        return f"{world_size()} × {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    return f"{len(os.sched_getaffinity(0))} CPU cores ({name}), {world_size()} rank{'s' * (world_size() > 1)}"
