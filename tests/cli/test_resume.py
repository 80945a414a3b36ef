"""Killed and resumed runs end bit-identical to an uninterrupted run. All tests run real processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import ROOT, TINY, end_state, metrics, run_program, start_program

from mgvideo.storage.checkpoints import Checkpoints

EXACT = [
    *TINY,
    *("precision=fp32", "deterministic=true", "test.enable=false", "model.dropout=0.4", "base.warmup_epochs=1"),
    *("base.epochs=8", "base.lr_milestones=[5]", "train.micro_batch_clips=4", "checkpoint.every_steps=2"),
]


def has_logged(step: int, folder: Path) -> bool:
    """Return whether the metrics of a run folder include this step."""
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step}' in path.read_text()


def kill_at_step(arguments: list[str], cwd: Path, step: int) -> int | None:
    """Start a run, kill it as soon as it has logged `step`, and return its exit code."""
    process = start_program(*arguments, log=cwd / "log", cwd=cwd)
    while process.is_alive() and not has_logged(step, cwd / "out"):
        time.sleep(0.002)
    process.kill()
    process.join()
    return process.exitcode


def signal_at_step(arguments: list[str], cwd: Path, step: int, number: int) -> int:
    """Start a run as users do, send it signal `number` as soon as it has logged `step`, and return its exit code."""
    with open(cwd / "log", "a") as file:
        command = [sys.executable, str(ROOT / "tools/run_net.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file) as process:
            while process.poll() is None and not has_logged(step, cwd / "out"):
                time.sleep(0.002)
            process.send_signal(number)
    return process.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_program(*EXACT, f"dataset.root={motion_root}", "output_dir=out", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def tensorboard_scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return (step, value) of a scalar in the TensorBoard files of a run folder."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.slow
def test_run_that_is_killed_twice_ends_with_the_same_weights(whole: Path, tmp_path: Path, motion_root: str) -> None:
    run = [*EXACT, f"dataset.root={motion_root}", "output_dir=out"]
    assert kill_at_step(run, tmp_path, 4) == -signal.SIGKILL
    assert kill_at_step([*run, "loader.num_workers=2"], tmp_path, 14) == -signal.SIGKILL
    # Truncate the newest checkpoint, as a power cut may.
    newest = max((tmp_path / "out/checkpoints").glob("step_*.pt"))
    os.truncate(newest, newest.stat().st_size // 2)
    done = run_program(*run, "loader.num_workers=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is damaged" in done.stdout
    out = tmp_path / "out"
    assert end_state(out) == end_state(whole)
    for key in ("loss", "val_top1"):
        assert metrics(out, key) == metrics(whole, key)
    for tag in ("train/loss", "val/top1"):
        assert tensorboard_scalars(out, tag) == tensorboard_scalars(whole, tag)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_run_that_receives_a_signal_loses_no_step(
    whole: Path, tmp_path: Path, motion_root: str, number: int, code: int
) -> None:
    run = [*EXACT, f"dataset.root={motion_root}", "output_dir=out", "checkpoint.every_steps=0"]
    assert signal_at_step(run, tmp_path, 6 if number == signal.SIGINT else 8, number) == code
    log = (tmp_path / "log").read_text()
    step = int(log.rsplit("continue from step ", 1)[1].split()[0])
    assert max(metrics(tmp_path / "out")) <= step <= max(metrics(tmp_path / "out")) + 2
    if number == signal.SIGTERM:
        return
    done = run_program(*run, cwd=tmp_path)
    assert f"resumed at step {step} of" in done.stdout, done.stderr
    assert end_state(tmp_path / "out") == end_state(whole)


def test_checkpoint_of_another_recipe_is_refused_with_the_changed_keys(
    whole: Path, tmp_path: Path, motion_root: str
) -> None:
    run = [*EXACT, f"dataset.root={motion_root}", f"output_dir={whole}"]
    before = json.dumps(end_state(whole), default=str)
    done = run_program(*run, "base.lr=0.07", "model.width=8", cwd=tmp_path)
    assert done.returncode == 2
    line = done.stderr.strip()
    assert len(line.splitlines()) == 1
    assert "base.lr was 0.05, is 0.07" in line
    assert "model.width was 4, is 8" in line
    assert json.dumps(end_state(whole), default=str) == before


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path, motion_root: str) -> None:
    run = [*EXACT, f"dataset.root={motion_root}", "output_dir=out"]
    first = start_program(*run, log=tmp_path / "log", cwd=tmp_path)
    while not (tmp_path / "out/plan.json").exists():
        assert first.is_alive()
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = run_program(*run, cwd=tmp_path)
        assert second.returncode == 2
        assert f"in use by another run (process {first.pid} on " in second.stderr
    finally:
        first.kill()
        first.join()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("fault", ["full", "read-only"])
@pytest.mark.slow
def test_full_or_read_only_disk_stops_the_run_with_one_line(tmp_path: Path, motion_root: str, fault: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=600k" if fault == "full" else "ro"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this host cannot mount a tmpfs")
    try:
        run = [*EXACT, f"dataset.root={motion_root}", f"output_dir={disk}/out", "checkpoint.keep=100"]
        done = run_program(*run, cwd=tmp_path, fresh=True)
        assert done.returncode == 2, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert len(errors) == 1, done.stderr
        assert ("No space left" if fault == "full" else "Read-only file system") in errors[0]
        if fault == "full":
            assert "intact" in errors[0]
            newest, warnings = Checkpoints(disk / "out/checkpoints").find_newest()
            assert newest is not None
            assert not warnings
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("after", "processes"), [(0, 0), (2, 2)], ids=["before a checkpoint", "on two ranks"])
@pytest.mark.slow
def test_command_printed_after_a_non_finite_loss_runs_to_the_end(
    after: int, processes: int, tmp_path: Path, motion_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fault = ["model._target_=faults.network", "+model.fault=bad_loss", "+model.once=once", f"+model.after={after}"]
    run = [*TINY, f"dataset.root={motion_root}", "output_dir=out folder", "resume=never", *fault, "base.lr=0.04"]
    run += ["loader.num_workers=0", "precision=fp32", "checkpoint.every_steps=1", "train.evals_per_phase=0"]
    run += ["test.enable=false", "train.micro_batch_clips=1000"]
    failed = run_program(*run, cwd=tmp_path, processes=processes, fresh=True)
    assert failed.returncode != 0
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "loss or gradients are not finite at step " in line
    assert ("no checkpoint was taken" in line) == (after == 0)
    command = line.split("To continue with half the learning rate: ")[1]
    assert ("base.lr=0.02" in shlex.split(command), "base.lr=0.04" in command) == (True, False)
    last_step = max(Checkpoints(tmp_path / "out folder/checkpoints").steps(), default=0)
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (f"resumed at step {last_step} of" in done.stdout) == (last_step > 0)
    assert ("base.lr was 0.04, is 0.02" in done.stdout) == (last_step > 0)
    if processes:
        assert "2 ranks" in done.stdout
    rates = metrics(tmp_path / "out folder", "lr")
    plan = json.loads((tmp_path / "out folder/plan.json").read_text())
    assert max(rates) == plan["phases"][-1]["steps"][1]
    assert plan["base"]["lr"] == 0.02
