"""Log a run to Weights & Biases or MLflow, beside TensorBoard. Only the chosen package is imported.

The ID of the tracked run is kept in `tracking.json` in the run's folder, so that a resumed run continues it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mgvideo.distributed.collectives import rank
from mgvideo.errors import UserError
from mgvideo.storage.files import write_atomic

TRACKERS = ("none", "wandb", "mlflow")  # values of the key `tracking`; the others are also modules and extras
PROJECT = "mgvideo"  # of wandb, and experiment of MLflow, unless their environment variables name another
IDS_FILE = "tracking.json"  # tracker → ID of the tracked run
CONNECTION_TIMEOUT_S = 30  # for wandb's server
MAX_PARAM_CHARACTERS = 500  # of the value of an MLflow parameter, on servers of any version
MAX_BATCH_PARAMS = 100  # in one request to MLflow


class Tracker(Protocol):
    """A tracked run."""

    id: str

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Log scalars of a training step."""

    def log_report(self, report: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Log the report of the test, as plain data and as files."""

    def close(self, failed: bool) -> None:
        """Write what is left, and mark the run as finished or failed."""


def check_tracker(kind: str) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    if kind != "none" and find_spec(kind) is None:
        raise UserError(f"tracking={kind}: {kind} is not installed: pip install 'mgvideo[{kind}]'")


def open_tracker(kind: str, folder: Path, config: Mapping[str, Any], resumes: bool) -> Tracker | None:
    """Start a tracked run on rank 0, or continue that of the folder if the run resumes.

    Args:
        kind: one of `TRACKERS`.
        folder: the run's folder, whose name is the name of the tracked run.
        config: all keys of the run, flat.
        resumes: whether the run resumes; otherwise a new tracked run starts.

    Returns:
        The tracker; None for `none`, and on all ranks but 0.

    Raises:
        UserError: the tracker cannot be reached, or refuses the run.
    """
    if kind == "none" or rank() != 0:
        return None
    ids = _read_ids(folder)
    tracker_class: Any = {"wandb": WandbTracker, "mlflow": MlflowTracker}[kind]
    tracker: Tracker = tracker_class(folder, config, ids.get(kind) if resumes else None)
    write_atomic(folder / IDS_FILE, json.dumps({**ids, kind: tracker.id}).encode())
    return tracker


def _read_ids(folder: Path) -> dict[str, str]:
    """Return the IDs of a folder's tracked runs, by tracker."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / IDS_FILE).read_text(encoding="utf-8")))
    return {}


class WandbTracker:
    """A run of Weights & Biases. wandb's environment variables apply, such as WANDB_PROJECT and WANDB_MODE=offline.

    Its own files are in `wandb/` in the run's folder. Points are over the field `step`, because wandb's own step cannot
    go back, as it must if a run resumes from an older checkpoint.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=run_id,
                resume="allow" if run_id else None,
                dir=str(folder),
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True, init_timeout=CONNECTION_TIMEOUT_S),
            )
        except wandb.errors.Error as error:
            raise UserError(f"tracking=wandb: {_first_line(error)} (WANDB_MODE=offline needs no server)") from error
        self.id = str(self._run.id)
        self._run.define_metric("*", step_metric="step")
        if self._run.url:  # None offline
            print(f"wandb: {self._run.url}", file=sys.stderr, flush=True)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self._run.log({**scalars, "step": step})

    def log_report(self, report: Mapping[str, Any], files: Sequence[Path]) -> None:
        """See `Tracker.log_report`."""
        self._run.summary.update({"report": dict(report)})
        for file in files:  # save() would make a link to a file elsewhere, and warn of it
            copy = shutil.copy(file, self._run.dir)
            self._run.save(copy, base_path=self._run.dir, policy="now")

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """A run of MLflow. MLflow's environment variables apply, such as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.

    Metrics are sent in the background, so that a slow server does not slow down training. A failure prints a warning
    once, and training continues.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # 7 by default, which takes minutes
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._sender = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self._warned = False
        where = f"tracking.json in {folder} names run {run_id}: " if run_id else ""
        try:
            self._client = MlflowClient()
            self.id = run_id or self._create_run(folder.resolve().name)
            if run_id:
                self._client.update_run(run_id, status="RUNNING")
            else:
                self._log_params(config)
        except MlflowException as error:
            raise UserError(
                f"tracking=mlflow: {where}{_first_line(error)}; MLFLOW_TRACKING_URI sets the server"
            ) from error

    def _create_run(self, name: str) -> str:
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(experiment_name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(experiment_name)
        return str(self._client.create_run(experiment_id, run_name=name).info.run_id)

    def _log_params(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:MAX_PARAM_CHARACTERS]) for name, value in config.items()]
        for start in range(0, len(params), MAX_BATCH_PARAMS):
            self._client.log_batch(self.id, params=params[start : start + MAX_BATCH_PARAMS])

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        metrics = [Metric(name, float(value), now_ms, step) for name, value in scalars.items()]
        self._send(partial(self._client.log_batch, self.id, metrics=metrics))

    def log_report(self, report: Mapping[str, Any], files: Sequence[Path]) -> None:
        """See `Tracker.log_report`. The report's data is one of its files, report.json."""
        for file in files:
            self._send(partial(self._client.log_artifact, self.id, str(file)))

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._send(partial(self._client.set_terminated, self.id, "FAILED" if failed else "FINISHED"))
        self._sender.shutdown()

    def _send(self, request: Callable[[], object]) -> None:
        """Send a request in the background, after those before it."""
        self._sender.submit(request).add_done_callback(self._warn_of_failure)

    def _warn_of_failure(self, sent: Future[object]) -> None:
        error = sent.exception()
        if error is not None and not self._warned:
            self._warned = True
            print(f"warning: tracking=mlflow: {_first_line(error)}; training continues", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
