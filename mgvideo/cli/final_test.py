"""The test of a network on several views per video, after training or of given weights, with its files and report."""

from __future__ import annotations

import time
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import nn

from mgvideo.distributed.collectives import rank
from mgvideo.distributed.watchdog import Position
from mgvideo.engine.evaluation import Evaluator, ProgressCallback, Scores, Views, report_batches
from mgvideo.engine.precision import Precision
from mgvideo.engine.running_metrics import TrainProgress
from mgvideo.engine.tasks import SingleLabel
from mgvideo.errors import UserError, one_line
from mgvideo.loading.loader import Loader, LoaderOptions
from mgvideo.plan.plan import Plan
from mgvideo.plan.schedules import baseline_of
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint
from mgvideo.storage.remote_output import RemoteOutput
from mgvideo.tracking.report import Report
from mgvideo.tracking.run_logger import RunLogger
from mgvideo.tracking.test_results import TestResults, draw_confusion, write_per_class, write_predictions

from .build import Data, build_model, build_normalize
from .resume import find_checkpoint


@dataclass(frozen=True)
class TestedNetwork:
    """A network to test, and where it comes from."""

    __test__ = False  # not a test, although pytest collects classes of such names

    model: nn.Module
    name: str  # of network and dataset, the title of the report
    weights: str  # where the weights come from
    progress: TrainProgress  # of their training; zero if it is not known
    plan: Plan | None = None  # of their training
    advice: tuple[str, ...] = ()  # commands to try next, for the end of the report


def load_for_test(
    cfg: DictConfig, name: str, precision: Precision, checkpoints: Checkpoints, mirror: RemoteOutput
) -> tuple[TestedNetwork, list[str]]:
    """Load the network of a run that only tests; also return warnings. All ranks call this together.

    Its weights are those of the checkpoint that `resume` and `output_dir` select, or else of `init_from`.

    Raises:
        UserError: the checkpoint does not fit the network.
    """
    path, warnings = find_checkpoint(cfg, checkpoints, mirror)
    model = build_model(cfg, precision, load_init_from=path is None)
    if path is None:
        if not cfg.init_from:
            warnings.append("the weights are random: set init_from=… or resume=… to test trained ones")
        return TestedNetwork(model, name, cfg.init_from or "random", TrainProgress()), warnings
    state = read_checkpoint(path)
    try:
        model.load_state_dict(state.get("model_ema", state["model"]))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit model=…: {one_line(error)}") from error
    progress = TrainProgress(**state["progress"])
    return TestedNetwork(model, name, str(path), progress, Plan.from_json(state["plan"])), warnings


def test(
    cfg: DictConfig,
    network: TestedNetwork,
    data: Data,
    precision: Precision,
    logger: RunLogger,
    on_progress: ProgressCallback,
    position: Position,
    options: LoaderOptions,
) -> None:
    """Test a network on the validation videos, and write its report and files. All ranks call this together."""
    base, keys = cfg.base, cfg.test
    views = Views.of_size(base.num_frames, base.frame_stride, keys.crop_size, keys.num_clips, keys.num_crops)
    loader = Loader(data.val, options, precision.device.type == "cuda")
    normalize = build_normalize(cfg, precision)
    evaluator = Evaluator(loader, data.task, data.classes, normalize, precision, keys.batch_size)
    started = time.perf_counter()
    logger.print_line(f"testing {len(data.val)} videos, {views.num_clips} clips × {views.num_crops} crops")

    result = evaluator(network.model, views, logger.showing_progress("test", on_progress))
    position.report("after the test")
    logger.stop_progress()
    if rank() != 0:
        return
    metrics = data.task.metrics(result.scores, result.labels)
    logger.log_failures(network.progress.step, result.failures, "val")
    write_files(data, logger, network.progress.step, result, metrics)
    progress, plan = network.progress, network.plan
    report = Report(
        name=network.name,
        weights=network.weights,
        plan=plan,
        baseline_steps=baseline_of(plan).steps if plan else None,
        hardware=progress.hardware,
        precision=progress.precision,
        date=progress.date,
        train_seconds=progress.seconds,
        test_seconds=time.perf_counter() - started,
        metrics=metrics,
        chance=data.task.chance(result.labels, data.classes),
        views=f"{views.num_clips}×{views.num_crops}",
        videos=len(data.val),
        failures=result.failures,
        bad_training_videos=logger.bad_videos.of_part("train"),
        folder=logger.folder,
        advice=network.advice,
    )
    logger.log_report(report)


def test_alone(
    cfg: DictConfig,
    network: TestedNetwork,
    data: Data,
    precision: Precision,
    logger: RunLogger,
    position: Position,
    options: LoaderOptions,
) -> None:
    """Test a network without training before it: see `test`."""
    on_progress = report_batches(position, (0, -1), "testing", cfg.hang_timeout, options.num_workers == 0)
    test(cfg, network, data, precision, logger, on_progress, position, options)


def write_files(data: Data, logger: RunLogger, step: int, result: Scores, metrics: dict[str, float]) -> None:
    """Write the results of the test to test.json, predictions.csv, per_class.csv, confusion.png and TensorBoard."""
    folder, dataset = logger.folder, data.val
    logger.log_test(step, metrics)
    paths = [dataset.entry(index).path for index in range(len(dataset))]
    results = TestResults(paths, dataset.class_names, result.scores, result.labels)
    write_predictions(folder / "predictions.csv", results)
    confusion = None
    if isinstance(data.task, SingleLabel):
        confusion = data.task.confusion(result.scores, result.labels)
        picture = draw_confusion(folder / "confusion.png", confusion, dataset.class_names)
        logger.board.add_image("test/confusion", picture, step, dataformats="HWC")
    metric, values = data.task.per_class(result.scores, result.labels)
    write_per_class(folder / "per_class.csv", metric, results, values, confusion)
