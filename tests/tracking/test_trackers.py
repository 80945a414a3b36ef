"""Runs logged to wandb and MLflow, without any server."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training import TINY, run_program, tiny_plan

from mgvideo.errors import UserError
from mgvideo.tracking import trackers
from mgvideo.tracking.run_logger import RunLogger
from mgvideo.tracking.trackers import MlflowTracker, check_tracker, open_tracker

BLOCK = 32 * 1024  # bytes
RECORD = {"phase": 0, "frames": 8, "size": 32, "batch": 8, "clips_per_s": 1.0, "data_wait": 0.0}


def log(folder: Path, kind: str, steps: range, fail: bool = False) -> str:
    """Log training steps and an evaluation as a run that starts at the first step; return the ID of the tracked run."""
    start = steps[0] - 1
    tracker = open_tracker(kind, folder, {"base.lr": 0.1, "model._target_": "x.y"}, resumes=start > 0)
    assert tracker
    logger = RunLogger(folder, tiny_plan(), start, tracker=tracker)
    try:
        for step in steps:
            logger.log_train_step({"step": step, "seconds": step / 2, "loss": 1 / step, **RECORD})
        logger.log_validation(step, step / 2, {"top1": 50.0})
        logger.log_test(step, {"top1": 60.0})
        tracker.log_report({"name": "tiny"}, [folder / "test.json"])
        if fail:
            raise KeyError
    finally:
        logger.close()
    return tracker.id


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The run's folder; both packages write below it or beside it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")  # of the machine
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run_seed0").mkdir()
    return tmp_path / "run_seed0"


def read_wandb(folder: Path) -> list[dict[str, float]]:
    """Return the logged points of all parts of an offline run, in the order in which they were written.

    A file of wandb has 7 bytes and then LevelDB's log format: blocks of 32 KiB with parts of records, each with a
    checksum (4 bytes), a length (2), a type (1: whole, 2: first, 3: middle, 4: last) and the data.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    points = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, place, content = file.read_bytes(), 7, b""
        while place < len(data):
            left_in_block = BLOCK - place % BLOCK
            if left_in_block < 7:
                place += left_in_block
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            content += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record, content = Record.FromString(content), b""
                items = record.history.item
                if items:
                    points.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items})
    return points


def test_wandb_gets_the_scalars_of_tensorboard_and_a_resumed_run_continues(offline: Path) -> None:
    pytest.importorskip("wandb")
    run_id = log(offline, "wandb", range(1, 4))
    assert json.loads((offline / "tracking.json").read_text()) == {"wandb": run_id}
    time.sleep(1.1)  # wandb's folders have names with whole seconds
    assert log(offline, "wandb", range(4, 6)) == run_id
    points = read_wandb(offline)
    assert [(p["step"], p["train/loss"]) for p in points if "train/loss" in p] == [(k, 1 / k) for k in range(1, 6)]
    assert [(p["step"], p["val/top1"]) for p in points if "val/top1" in p] == [(3, 50), (5, 50)]
    assert len(list(offline.glob("wandb/offline-run-*/files/test.json"))) == 2
    assert [p["test/top1"] for p in points if "test/top1" in p] == [60, 60]
    assert log(offline, "wandb", range(1, 3)) != run_id, "a run that starts anew is another tracked run"


def test_mlflow_gets_the_scalars_of_tensorboard_and_a_resumed_run_continues(offline: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    with pytest.raises(KeyError):
        log(offline, "mlflow", range(1, 4), fail=True)
    client, run_id = mlflow.MlflowClient(), json.loads((offline / "tracking.json").read_text())["mlflow"]
    assert client.get_run(run_id).info.status == "FAILED"
    assert log(offline, "mlflow", range(4, 6)) == run_id
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run_seed0")
    assert run.data.params == {"base.lr": "0.1", "model._target_": "x.y"}
    history = client.get_metric_history(run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(k, 1 / k) for k in range(1, 6)]
    assert [m.step for m in client.get_metric_history(run_id, "val/top1")] == [3, 5]
    assert log(offline, "mlflow", range(1, 3)) != run_id


def test_a_run_of_another_store_is_named(offline: Path) -> None:
    pytest.importorskip("mlflow")
    (offline / "tracking.json").write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    with pytest.raises(UserError, match=r"tracking=mlflow: tracking.json in .* names run 0123.*MLFLOW_TRACKING_URI"):
        open_tracker("mlflow", offline, {}, resumes=True)


def test_a_server_that_fails_later_is_a_warning(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    tracker = open_tracker("mlflow", offline, {}, resumes=False)
    assert isinstance(tracker, MlflowTracker)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is gone\nand more")

    tracker._client = SimpleNamespace(log_batch=fail, set_terminated=fail)  # type: ignore[assignment]
    for step in range(3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.close(failed=False)
    assert capsys.readouterr().err == "warning: tracking=mlflow: the server is gone; training continues\n"


def test_a_login_that_is_missing_is_one_line(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def init(**_: Any) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"tracking=wandb: No API key configured.*WANDB_MODE=offline"):
        open_tracker("wandb", offline, {}, resumes=False)


def test_a_package_that_is_not_installed_is_one_line(
    tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    check_tracker("none")
    result = run_program(*TINY, f"dataset.root={motion_root}", "output_dir=out", "tracking=mlflow", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: tracking=mlflow: mlflow is not installed: pip install 'mgvideo[mlflow]'\n"
    assert not (tmp_path / "out").exists()


def test_only_rank_0_tracks_and_nothing_is_imported_for_none(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)  # an import raises ImportError
    assert open_tracker("none", offline, {}, resumes=False) is None
    monkeypatch.setattr(trackers, "rank", lambda: 1)
    assert open_tracker("wandb", offline, {}, resumes=False) is None
    assert not (offline / "tracking.json").exists()


def test_a_run_logs_its_report_and_config(offline: Path, motion_root: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    command = [*TINY, f"dataset.root={motion_root}", f"output_dir={offline}", "schedule=baseline", "tracking=mlflow"]
    result = run_program(*command, "base.epochs=0.5", "base.lr_milestones=[]", cwd=offline)
    assert result.returncode == 0, result.stderr
    client, run_id = mlflow.MlflowClient(), json.loads((offline / "tracking.json").read_text())["mlflow"]
    run = client.get_run(run_id)
    report = json.loads((offline / "report.json").read_text())
    assert run.data.metrics["test/top1"] == pytest.approx(report["metrics"]["top1"])
    assert run.data.params["base.epochs"] == "0.5"
    files = {file.path for file in client.list_artifacts(run_id)}
    assert files == {"report.md", "report.json", "predictions.csv", "per_class.csv"}
    again = run_program(*command, "base.epochs=0.5", "base.lr_milestones=[]", cwd=offline)
    assert again.returncode == 0, again.stderr
    assert json.loads((offline / "tracking.json").read_text())["mlflow"] == run_id
