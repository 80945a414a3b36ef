"""The program `mgvideo run`: train a network along its plan, test it on several views per video, write a report."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
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
from mgvideo.distributed.watchdog import LEAVING, position, report_position
from mgvideo.engine.evaluation import Evaluator, Scores, Views
from mgvideo.engine.forward_check import check_forward
from mgvideo.engine.micro_batches import is_out_of_memory, largest_step_clips
from mgvideo.engine.precision import Precision, choose_precision
from mgvideo.engine.tasks import SingleLabel
from mgvideo.engine.trainer import Trainer, TrainOptions
from mgvideo.errors import NonFiniteError, UserError
from mgvideo.loading.loader import Loader, explain_dead_worker
from mgvideo.plan.plan import Grid, Plan
from mgvideo.plan.schedules import baseline_of
from mgvideo.plan.shards import check_shards
from mgvideo.plan.table import make_plan_table
from mgvideo.storage.checkpoints import Checkpoints, lock_run_folder, write_atomic
from mgvideo.storage.paths import belongs_to
from mgvideo.storage.remote_output import RemoteOutput
from mgvideo.tracking.report import Report, describe_hardware
from mgvideo.tracking.run_logger import RunLogger

from . import app
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
    resume_fingerprint,
    software_versions,
)
from .schema import check_values


def main(arguments: Sequence[str]) -> None:
    """Entry point of `mgvideo run` and tools/run_net.py."""
    app.main("run", "Train and test a video network along a multigrid plan.", run, arguments)


def run(cfg: DictConfig) -> None:
    """Train and test as a composed config says. Every rank calls this."""
    check_values(cfg)
    check_groups(cfg)
    with handle_signals(), process_group() as device:
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not cfg.deterministic  # a plan has few shapes, which repeat
        data = build_data(cfg)
        plan = build_plan(cfg, len(data.train))
        check_shards(plan, world_size())
        if cfg.train.precise_bn_clips:
            check_shards(baseline_of(plan), world_size())
        precision = choose_precision(cfg.precision, device)
        mirror = RemoteOutput(cfg.output_dir)
        folder = mirror.folder
        checkpoints = Checkpoints(folder / "checkpoints", cfg.checkpoint.keep, on_write=mirror.push)
        with locked_run_folder(folder), mirror.synced(), explain_errors(cfg, checkpoints):
            path, warnings = find_checkpoint(cfg, checkpoints, mirror)
            model = build_model(cfg, precision, load_init_from=path is None)
            if cfg.init_from and path is None and (warning := published_clip_warning(cfg, app.chosen_keys())):
                warnings.append(f"init_from: {warning}")
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
            logger = RunLogger(folder, plan, step, active=rank() == 0, evaluated=progress["evaluated"] == step)
            try:
                for warning in [*filter(None, [precision.warning]), *faults, *warnings, *differences]:
                    logger.print_line(f"warning: {warning}")
                print_summary(cfg, logger, plan, precision, data)
                trainer = build_trainer(cfg, model, plan, data, precision, logger, checkpoints, state)
                if state:
                    trainer.load(state)
                    logger.print_line(f"resumed at step {step} of {plan.steps} from {checkpoints.folder}")
                if cfg.train.enable and (
                    archive_message := archive_newer_checkpoints(path, state, checkpoints, mirror)
                ):
                    logger.print_line(f"warning: {archive_message}")
                defer_signals()
                if (cfg.train.enable and step < plan.steps) or not trainer.progress.hardware:
                    trainer.progress.record_environment(describe_hardware(device), str(precision))
                if cfg.train.enable:
                    trainer.train()
                if cfg.test.enable:
                    test(cfg, trainer, data, logger)
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
def explain_errors(cfg: DictConfig, checkpoints: Checkpoints) -> Iterator[None]:
    """Print a line if a signal stops the run; raise UserError for a non-finite loss, disk, memory and workers.

    The message for a non-finite loss includes the command that continues with half the learning rate.
    """
    try:
        with _explain_torch_errors():
            yield
    except NonFiniteError as error:
        raise UserError(
            f"{error}. To continue with half the learning rate: {lower_lr_command(cfg, checkpoints)}"
        ) from error
    except Stopped as stop:
        report_position(LEAVING)
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
def _explain_torch_errors() -> Iterator[None]:
    """Raise a clearer error in place of torch's for a dead worker, memory, or a non-deterministic operation."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's signal handler raises it for a dead worker
        clear_error = explain_dead_worker(error)
        if clear_error is error:
            clear_error = _explain_torch_error(error)
        if clear_error is error:
            raise
        raise clear_error from error


def _explain_torch_error(error: Exception) -> Exception:
    """Return a UserError for an error of torch that a config key avoids, otherwise the error itself."""
    if is_out_of_memory(error):
        return UserError(
            f"out of memory {position()}: lower train.micro_batch_clips, or choose a smaller model or base.crop_size"
        )
    text = str(error).splitlines()[0] if str(error) else ""
    if "use_deterministic_algorithms" in text:
        return UserError(f"deterministic=true: {text.split(',')[0]}: set deterministic=false or change the network")
    return error


def write_run_files(cfg: DictConfig, data: Data, plan: Plan, folder: Path) -> None:
    """Write config.yaml, classes.txt and plan.json into the run's folder. Rank 0 alone writes."""
    if rank() == 0:
        names = "".join(f"{name}\n" for name in data.train.class_names)
        write_atomic(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        write_atomic(folder / "classes.txt", names.encode(errors="surrogateescape"))
        write_atomic(folder / "plan.json", json.dumps(plan.to_json(), indent=1).encode())


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
    state: dict[str, Any] | None = None,
) -> Trainer:
    """Build the trainer with its loaders, optimizer and validation."""
    options = loader_options(cfg)
    for warning in check_shared_memory(cfg, plan, options):
        logger.print_line(f"warning: {warning}")
    pin = precision.device.type == "cuda"
    loader = Loader(data.train, options, pin)  # early, so that its workers can import modules in the meantime
    normalize = build_normalize(cfg, precision)
    if cfg.train.enable:
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
    side = base.crop_size
    views = Views(Grid(base.num_frames, side, (base.frame_stride, base.frame_stride), (side, side)))
    evaluator = Evaluator(
        Loader(data.val, options, pin), data.task, data.classes, normalize, precision, cfg.test.batch_size
    )
    return Trainer(
        model,
        plan,
        data.task,
        instantiate(cfg.optimizer, model, lr=base.lr),
        loader,
        seed=cfg.seed,
        normalize=normalize,
        precision=precision,
        options=TrainOptions(
            micro_batch_clips=max_clips,
            log_every=cfg.train.log_every,
            evals_per_phase=cfg.train.evals_per_phase,
            precise_bn_clips=cfg.train.precise_bn_clips,
            checkpoint_every=cfg.checkpoint.every_steps,
            checkpoint_minutes=cfg.checkpoint.every_minutes,
            max_bad_fraction=cfg.dataset.max_bad_fraction,
            hang_timeout=cfg.hang_timeout,
            compile=cfg.compile,
            profile=cfg.train.profile,
        ),
        logger=logger,
        checkpoints=checkpoints,
        validate=(evaluator, views) if cfg.train.evals_per_phase else None,
    )


def test(cfg: DictConfig, trainer: Trainer, data: Data, logger: RunLogger) -> None:
    """Test the model on several views per video and write the report. All ranks call this together."""
    if cfg.train.enable and trainer.progress.evaluated < trainer.progress.step:
        trainer.precise_bn()  # no validation has computed them for these weights
    base, size = trainer.plan.base, cfg.test.crop_size
    views = Views(
        Grid(base.num_frames, size, (base.frame_stride, base.frame_stride), (size, size)),
        cfg.test.num_clips,
        cfg.test.num_crops,
    )
    loader = Loader(data.val, trainer.loader.options, trainer.loader.pin_memory)
    evaluator = Evaluator(loader, data.task, data.classes, trainer.normalize, trainer.precision, cfg.test.batch_size)
    started = time.perf_counter()
    logger.print_line(f"testing {len(data.val)} videos, {views.num_clips} clips × {views.num_crops} crops")
    report_progress = trainer.progress_callback("testing", -1)

    def on_progress(done: int, total: int, is_waiting: bool) -> None:
        report_progress(done, total, is_waiting)
        logger.show_test_progress(done, total)

    result = evaluator(trainer.model, views, on_progress)
    report_position("after the test")
    logger.stop_progress()
    metrics = data.task.metrics(result.scores, result.labels)
    if rank() != 0:
        return
    if result.failures:
        logger.log_failures(trainer.progress.step, result.failures)
    record_test(trainer, data, logger, result, metrics)
    choices: Any = HydraConfig.get().runtime.choices
    report = Report(
        name=f"{choices.model} on {choices.dataset}, {trainer.plan.schedule}",
        plan=trainer.plan,
        baseline_steps=baseline_of(trainer.plan).steps,
        hardware=trainer.progress.hardware,
        precision=trainer.progress.precision,
        date=trainer.progress.date,
        train_seconds=trainer.progress.seconds,
        test_seconds=time.perf_counter() - started,
        metrics=metrics,
        views=f"{views.num_clips}×{views.num_crops}",
        videos=len(data.val),
        failures=result.failures,
        folder=logger.folder,
        advice=advice(choices, plan_name=trainer.plan.schedule),
    )
    report.write()
    logger.print_line("\n" + report.markdown())


def record_test(trainer: Trainer, data: Data, logger: RunLogger, result: Scores, metrics: dict[str, float]) -> None:
    """Write the test metrics, and for single labels the confusion matrix, to TensorBoard and test.json."""
    step = trainer.progress.step
    for name, value in metrics.items():
        logger.board.add_scalar(f"test/{name}", value, step)
    if isinstance(data.task, SingleLabel):
        confusion = data.task.confusion(result.scores, result.labels).float()
        fractions = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
        logger.board.add_image("test/confusion", 1 - fractions, step, dataformats="HW")
    write_atomic(logger.folder / "test.json", json.dumps({"step": step, **metrics}).encode())


def advice(choices: Any, plan_name: str) -> tuple[str, ...]:
    """Return commands to try next, for the end of the report."""
    command = f"python tools/run_net.py model={choices.model} dataset={choices.dataset}"
    other_schedule = "baseline" if plan_name != "baseline" else "multigrid"
    return (
        f"`{command} schedule={other_schedule}`: the same recipe with another schedule",
        "`python tools/run_net.py dataset=folder dataset.root=/path/to/clips`: your own videos, one folder per class",
        "`python tools/plan.py experiment=kinetics/slowfast_8x8_r50 gpus=8`: the plan of a published recipe",
    )
