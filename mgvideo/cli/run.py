"""The program `mgvideo run`: train a network along its plan, test it on several views per video, write a report."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mgvideo.distributed.collectives import rank, world_size
from mgvideo.distributed.process_group import process_group
from mgvideo.distributed.signals import Stopped, defer_signals, handle_signals
from mgvideo.distributed.watchdog import LEAVING, Position
from mgvideo.engine.evaluation import Evaluator, Views
from mgvideo.engine.forward_check import check_forward
from mgvideo.engine.freezing import freeze
from mgvideo.engine.micro_batches import is_out_of_memory, largest_step_clips
from mgvideo.engine.precision import Precision, choose_precision, is_worth_tuning
from mgvideo.engine.train_step import TrainStep
from mgvideo.engine.trainer import Trainer, TrainOptions
from mgvideo.errors import NonFiniteError, UserError
from mgvideo.loading.loader import Loader, explain_dead_worker
from mgvideo.models.features import find_classifier
from mgvideo.plan.options import statistics_plan
from mgvideo.plan.plan import Plan
from mgvideo.plan.shards import check_shards
from mgvideo.plan.table import make_plan_table
from mgvideo.storage.checkpoints import Checkpoints, lock_run_folder
from mgvideo.storage.files import write_atomic
from mgvideo.storage.paths import belongs_to
from mgvideo.storage.remote_output import RemoteOutput
from mgvideo.tracking.report import describe_hardware
from mgvideo.tracking.run_logger import RunLogger
from mgvideo.tracking.trackers import Tracker, check_tracker, open_tracker

from . import app, final_test
from .build import (
    Data,
    build_data,
    build_model,
    build_normalize,
    build_plan,
    check_shared_memory,
    fall_back_if_convolutions_are_wrong,
    loader_options,
    micro_batch_clips,
    published_clip_warning,
)
from .groups import check_groups
from .resume import (
    archive_newer_checkpoints,
    find_checkpoint,
    keep_micro_batch_clips,
    load_checkpoint,
    lower_lr_command,
    resolve_decay_from,
    resume_fingerprint,
    software_versions,
)
from .schema import check_values
from .training import build_augmentation, build_sampler
from .values import flatten


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo run` and tools/run_net.py."""
    app.main("run", "Train and test a video network along a multigrid plan.", run, arguments)


def run(cfg: DictConfig) -> None:
    """Train and test as a composed config says. Every rank calls this."""
    check_values(cfg)
    check_groups(cfg)
    check_tracker(cfg.tracking)
    position = Position()
    with handle_signals(), process_group(position) as device:
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if not cfg.train.enable:
            run_test(cfg, device, position)
            return
        data = build_data(cfg)
        resolve_decay_from(cfg)
        plan = build_plan(cfg, len(data.train))
        torch.backends.cudnn.benchmark = not cfg.deterministic and is_worth_tuning(plan)
        check_shards(plan, world_size())
        if cfg.train.precise_bn_clips:
            check_shards(statistics_plan(plan), world_size())
        precision = choose_precision(cfg.precision, device)
        mirror = RemoteOutput(cfg.output_dir)
        folder = mirror.folder
        checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, on_write=mirror.push)
        with locked_run_folder(folder), mirror.synced(), explain_errors(cfg, checkpoints, position):
            path, warnings = find_checkpoint(cfg, checkpoints, mirror)
            model = build_model(cfg, precision, load_init_from=path is None)
            freeze(model, cfg.train.freeze, find_classifier)
            if path is None:
                warnings += [*init_from_warnings(cfg), *frozen_warnings(cfg)]
            precision, faults = fall_back_if_convolutions_are_wrong(cfg, model, plan, precision)
            checkpoints.fingerprint, checkpoints.versions = (
                resume_fingerprint(cfg, data, precision),
                software_versions(),
            )
            state, differences = (
                load_checkpoint(cfg, path, checkpoints.fingerprint, checkpoints.versions, plan) if path else (None, [])
            )
            write_run_files(cfg, data, plan, folder)
            progress = state["progress"] if state else {"step": 0, "evaluated": 0}
            step = progress["step"]
            tracker, evaluated = build_tracker(cfg, folder, step), progress["evaluated"] == step
            logger = RunLogger(folder, plan, step, active=rank() == 0, evaluated=evaluated, tracker=tracker)
            try:
                for warning in [*filter(None, [precision.warning]), *faults, *warnings, *differences]:
                    logger.print_line(f"warning: {warning}")
                print_summary(cfg, logger, plan, precision, data)
                trainer = build_trainer(cfg, model, plan, data, precision, logger, checkpoints, position, state)
                if state:
                    trainer.load(state)
                    logger.print_line(f"resumed at step {step} of {plan.steps} from {checkpoints.folder}")
                if archive_message := archive_newer_checkpoints(path, state, checkpoints, mirror):
                    logger.print_line(f"warning: {archive_message}")
                defer_signals()
                if step < plan.steps or not trainer.progress.hardware:
                    trainer.progress.record_environment(describe_hardware(device), str(precision))
                trainer.train()
                if cfg.test.enable:
                    test_after_training(cfg, trainer, data, logger)
            finally:
                logger.close()


@contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Create the run's folder on rank 0 and lock it against other runs.

    Raises:
        UserError: Another run uses the folder, or it cannot be written.
    """
    if rank() != 0:
        yield
        return
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_run_folder(folder))
        except OSError as error:
            raise UserError(f"cannot write into output_dir={folder}: {error.strerror}") from error
        yield


@contextmanager
def explain_errors(cfg: DictConfig, checkpoints: Checkpoints, position: Position) -> Iterator[None]:
    """Print a line if a signal stops the run; raise UserError for a non-finite loss, disk, memory and workers.

    The message for a non-finite loss includes the command that continues with half the learning rate.
    """
    try:
        with _explain_torch_errors(position):
            yield
    except NonFiniteError as error:
        raise UserError(
            f"{error}. To continue with half the learning rate: {lower_lr_command(cfg, checkpoints)}"
        ) from error
    except Stopped as stop:
        position.report(LEAVING)
        checkpoints.wait()
        if rank() == 0:
            step = max(checkpoints.steps(), default=0)
            print(f"stopped by {stop.name}; run the same command to continue from step {step}", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        folder = checkpoints.folder.parent
        is_elsewhere = error.filename is not None and not belongs_to(error.filename, folder)
        where = error.filename if is_elsewhere else f"cannot write into output_dir={folder}"
        raise UserError(f"{where}: {error.strerror}; earlier checkpoints are intact") from error


@contextmanager
def _explain_torch_errors(position: Position) -> Iterator[None]:
    """Raise a clearer error in place of torch's for a dead worker, memory, or a non-deterministic operation."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's signal handler raises it for a dead worker
        clear_error = explain_dead_worker(error)
        if clear_error is error:
            clear_error = _explain_torch_error(error, position)
        if clear_error is error:
            raise
        raise clear_error from error


def _explain_torch_error(error: Exception, position: Position) -> Exception:
    """Return a UserError that names the config key to change, or the error itself if no key avoids it."""
    if is_out_of_memory(error):
        return UserError(
            f"out of memory {position}: lower train.micro_batch_clips, or choose a smaller model or base.crop_size"
        )
    text = str(error).splitlines()[0] if str(error) else ""
    if "use_deterministic_algorithms" in text:
        return UserError(f"deterministic=true: {text.split(',')[0]}: set deterministic=false or change the network")
    return error


def init_from_warnings(cfg: DictConfig) -> list[str]:
    """Return a warning if the weights of `init_from` were trained with other clips, unless the command chose these."""
    warning = published_clip_warning(cfg, app.chosen_keys()) if cfg.init_from else None
    return [f"init_from: {warning}"] if warning else []


def frozen_warnings(cfg: DictConfig) -> list[str]:
    """Return a warning if a run that starts anew freezes random weights."""
    if cfg.train.freeze is None or cfg.init_from:
        return []
    return [f"train.freeze={cfg.train.freeze}: the frozen weights are random: set init_from=… to use trained ones"]


def write_run_files(cfg: DictConfig, data: Data, plan: Plan | None, folder: Path) -> None:
    """Write config.yaml, classes.txt and, with a plan, plan.json into the run's folder. Rank 0 alone writes."""
    if rank() == 0:
        names = "".join(f"{name}\n" for name in data.val.class_names)
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        write_atomic(folder / "classes.txt", names.encode(errors="surrogateescape"))
        if plan:
            write_atomic(folder / "plan.json", json.dumps(plan.to_json(), indent=1).encode())


def build_tracker(cfg: DictConfig, folder: Path, step: int) -> Tracker | None:
    """Start the tracked run of `tracking=…`, or continue it if the run resumes at a step; None on ranks but 0."""
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return open_tracker(cfg.tracking, folder, flatten(config), resumes=step > 0)


def print_summary(cfg: DictConfig, logger: RunLogger, plan: Plan, precision: Precision, data: Data) -> None:
    """Print what the run will do: its model, data, plan and precision."""
    choices: Any = HydraConfig.get().runtime.choices
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    recipe = choices.get("recipe", "none")
    logger.print_line(
        f"{choices.model} on {choices.dataset}, recipe {recipe}, schedule {plan.schedule}{ranks}; "
        f"run folder {cfg.output_dir}"
    )
    logger.print_renderable(make_plan_table(plan, gpus=world_size()))
    for note in dict.fromkeys((*plan.notes, *data.train.notes, *data.val.notes)):
        logger.print_line(f"note: {note}")
    logger.print_line(f"precision: {precision}")


def build_trainer(
    cfg: DictConfig,
    model: nn.Module,
    plan: Plan,
    data: Data,
    precision: Precision,
    logger: RunLogger,
    checkpoints: Checkpoints,
    position: Position,
    state: dict[str, Any] | None = None,
) -> Trainer:
    """Build the trainer with its training step, loaders and validation."""
    options = loader_options(cfg)
    for warning in check_shared_memory(cfg, plan, options):
        logger.print_line(f"warning: {warning}")
    pin = precision.device.type == "cuda"
    loader = Loader(data.train, options, pin)  # early, so that its workers can import modules in the meantime
    normalize = build_normalize(cfg, precision)
    smallest = min((slot.grid for phase in plan.phases for slot in phase.slots), key=lambda grid: grid.volume)
    check_forward(model, smallest, precision.device)
    max_clips = micro_batch_clips(cfg, model, plan, precision)
    if state and cfg.train.micro_batch_clips is None:
        max_clips, change = keep_micro_batch_clips(state.get("micro_batch_clips"), max_clips, plan)
        if change:
            logger.print_line(f"warning: {change}")
    if max_clips < largest_step_clips(plan, world_size()):
        logger.print_line(f"memory holds {max_clips} clips of the base grid at once: larger steps run in micro-batches")
    base = plan.base
    views = Views.of_size(base.num_frames, base.frame_stride, base.crop_size)
    evaluator = Evaluator(
        Loader(data.val, options, pin), data.task, data.classes, normalize, precision, cfg.test.batch_size
    )
    train_step = TrainStep(
        model,
        plan,
        data.task,
        instantiate(cfg.optimizer, model, lr=base.lr),
        seed=cfg.seed,
        normalize=normalize,
        precision=precision,
        micro_batch_clips=max_clips,
        clip_grad_norm=cfg.train.clip_grad_norm,
        ema=cfg.train.ema,
        compile=cfg.compile,
        position=position,
        hang_timeout=cfg.hang_timeout,
        augmentation=build_augmentation(cfg, data.classes, precision.device),
    )
    return Trainer(
        train_step,
        loader,
        options=TrainOptions(
            log_every=cfg.train.log_every,
            evals_per_phase=cfg.train.evals_per_phase,
            precise_bn_clips=cfg.train.precise_bn_clips,
            checkpoint_every=cfg.checkpoint.every_steps,
            checkpoint_minutes=cfg.checkpoint.every_minutes,
            max_bad_fraction=cfg.dataset.max_bad_fraction,
            profile=cfg.train.profile,
        ),
        logger=logger,
        checkpoints=checkpoints,
        validate=(evaluator, views) if cfg.train.evals_per_phase else None,
        sampler=build_sampler(cfg, plan, data.train),
    )


def test_after_training(cfg: DictConfig, trainer: Trainer, data: Data, logger: RunLogger) -> None:
    """Test the trained network. All ranks call this together."""
    if trainer.progress.evaluated < trainer.progress.step:
        trainer.precise_bn()  # no validation has computed them for these weights
        logger.stop_progress()
    plan, train_step = trainer.plan, trainer.train_step
    average = "" if train_step.ema is None else ", moving average"
    network = final_test.TestedNetwork(
        model=trainer.evaluated_model,
        name=f"{_run_name()}, {plan.schedule}",
        weights=f"step {trainer.progress.step} of {plan.steps}{average}",
        progress=trainer.progress,
        plan=plan,
        advice=advice(cfg, data, plan.schedule),
    )
    on_progress = trainer.progress_callback("testing", -1)
    options = trainer.loader.options
    final_test.test(cfg, network, data, train_step.precision, logger, on_progress, train_step.position, options)


def run_test(cfg: DictConfig, device: torch.device, position: Position) -> None:
    """Test weights without a plan and without the training videos. All ranks call this together."""
    data = build_data(cfg, train=False)
    precision = choose_precision(cfg.precision, device)
    mirror = RemoteOutput(cfg.output_dir)
    folder = mirror.folder
    checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, on_write=mirror.push)
    with locked_run_folder(folder), mirror.synced(), explain_errors(cfg, checkpoints, position):
        network, warnings = final_test.load_for_test(cfg, _run_name(), precision, checkpoints, mirror)
        if network.weights == cfg.init_from:
            warnings += init_from_warnings(cfg)
        network.progress.record_environment(describe_hardware(device), str(precision))
        write_run_files(cfg, data, network.plan, folder)
        step = network.progress.step
        logger = RunLogger(folder, network.plan, step, active=rank() == 0, tracker=build_tracker(cfg, folder, step))
        options = loader_options(cfg)
        try:
            for warning in [*filter(None, [precision.warning]), *warnings, *check_shared_memory(cfg, None, options)]:
                logger.print_line(f"warning: {warning}")
            recipe = HydraConfig.get().runtime.choices["recipe"]
            logger.print_line(f"{network.name}, recipe {recipe}, without training; run folder {cfg.output_dir}")
            logger.print_line(f"precision: {precision}")
            defer_signals()
            if cfg.test.enable:
                final_test.test_alone(cfg, network, data, precision, logger, position, options)
        finally:
            logger.close()


def _run_name() -> str:
    choices: Any = HydraConfig.get().runtime.choices
    return f"{choices.model} on {choices.dataset}"


def advice(cfg: DictConfig, data: Data, plan_name: str) -> tuple[str, ...]:
    """Return commands to try next, for the end of the report: this run's own overrides with one thing changed."""
    schedule = "multigrid" if plan_name == "baseline" else "baseline"
    own_keys = [app.override_key(override) for override in HydraConfig.get().overrides.task]
    of_schedule = [key for key in own_keys if key.startswith("schedule.")]  # another schedule may not have them
    other = app.same_command({"schedule": schedule}, without=["output_dir", "resume", *of_schedule])
    lines = [f"`{other}`: the same recipe with another schedule"]
    video = data.val.path(0) if hasattr(data.val, "path") else ""
    if Path(video).is_file():
        lines.append(f"`{app.predict_command(video, cfg.output_dir)}`: the top classes of a video")
    choices: Any = HydraConfig.get().runtime.choices
    if choices.dataset == "motion":
        lines.append("docs/datasets/folder.md: train on your own videos")
    return tuple(lines)
