"""Runs that stop in the middle of an operation, and resumed runs with changed data, plan, software or memory.

Most tests run `mgvideo run` in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import overrides
from refusals import error_line
from training import KNOBS, PRELOADED_MODULES, ROOT, TINY, end_state, metrics
from videos import needs_decord

from mgvideo.cli.run import main
from mgvideo.datasets.motion import make_motion
from mgvideo.loading.workers import start_fork_server
from mgvideo.models.small import r2plus1d_small
from mgvideo.storage.checkpoints import Checkpoints, read_checkpoint

RUN = [*TINY, "loader.num_workers=0", "precision=fp32", "test.enable=false", "checkpoint.every_steps=2", "decoder=pyav"]
RUN += ["base.epochs=4", "base.lr_milestones=[2]", "train.micro_batch_clips=16"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, motion_root: str) -> Path:
    """The folder of an uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    main([*RUN, f"dataset.root={motion_root}", f"output_dir={folder}", "checkpoint.keep=100"])
    return folder


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_signal_during_validation_repeats_only_the_validation(
    whole: Path, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*RUN, f"dataset.root={motion_root}", "output_dir=out"]
    ask = overrides("sigterm", "val", rank=0, after=5, once="asked")
    line = error_line(main, [*run, *ask], capsys, 128 + signal.SIGTERM)
    stopped = int(line.split("continue from step ")[1])
    assert stopped == min(metrics(whole, "val_top1")), "the step of the first validation"
    assert not metrics(tmp_path / "out", "val_top1")
    main(run)
    assert f"resumed at step {stopped} of" in capsys.readouterr().out
    assert end_state(tmp_path / "out") == end_state(whole)
    for key in ("loss", "val_top1"):
        assert metrics(tmp_path / "out", key) == metrics(whole, key)


def die_writing(call: str, name: str, arguments: list[str]) -> None:
    """Run, and SIGKILL this process when `call` (os.fsync or os.replace) is about to handle the file `name`."""
    torch.set_num_threads(1)
    original = getattr(os, call)

    def kill_at_file(target: int | str, *more: str) -> None:
        path = os.readlink(f"/proc/self/fd/{target}") if call == "fsync" else str(more[0])
        if Path(path).name == name:
            if call == "fsync":
                os.ftruncate(target, os.fstat(target).st_size // 2)  # half of it is on disk
            os.kill(os.getpid(), signal.SIGKILL)
        original(target, *more)

    setattr(os, call, kill_at_file)
    main(arguments)


def test_run_killed_while_writing_a_checkpoint_resumes_from_the_previous_one(
    whole: Path, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*RUN, f"dataset.root={motion_root}", "output_dir=out"]
    checkpoints = Checkpoints(tmp_path / "out/checkpoints")
    steps = Checkpoints(whole / "checkpoints").steps()
    start_fork_server(PRELOADED_MODULES)
    moments = [("fsync", steps[2], ".pt.tmp"), ("replace", steps[5], ".pt")]  # half written; written but not renamed
    for call, step, suffix in moments:
        arguments = (call, f"step_{step:08d}{suffix}", run)
        process = multiprocessing.get_context("forkserver").Process(target=die_writing, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list(checkpoints.folder.glob("*.tmp")), "it was killed while writing"
        assert checkpoints.find_newest() == (checkpoints.path(steps[steps.index(step) - 1]), [])
    main(run)
    assert f"resumed at step {steps[4]} of" in capsys.readouterr().out
    assert end_state(tmp_path / "out") == end_state(whole)
    assert metrics(tmp_path / "out") == metrics(whole)


def test_second_ctrl_c_exits_at_once(motion_root: str, tmp_path: Path) -> None:
    hang = overrides("hang", rank=0, after=200, once=tmp_path / "hangs")
    run = [*RUN, *hang, f"dataset.root={motion_root}", "output_dir=out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    with open("log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools/run_net.py"), *run], env=environment, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: (tmp_path / "hangs").exists(), process)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "press Ctrl-C again to exit at once" in Path("log").read_text(), process)
        time.sleep(1.2)  # an earlier signal counts as the first one, forwarded by a launcher
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130, "it does not wait for the clip, which takes an hour"
    finally:
        process.kill()
    newest, warnings = Checkpoints(tmp_path / "out/checkpoints").find_newest()
    assert newest is not None
    assert not warnings


WORKERS = {
    "fork": ["loader.start_method=fork"],
    "forkserver": ["loader.start_method=forkserver"],
    "spawn": ["loader.start_method=spawn"],
    "none": ["loader.num_workers=0"],
}


@pytest.mark.parametrize(
    ("during", "workers"),
    [*(("validation", method) for method in WORKERS), ("precise BN", "forkserver"), ("test", "forkserver")],
)
@pytest.mark.slow
def test_ctrl_c_on_a_terminal_stops_the_run_cleanly_with_workers(
    during: str, workers: str, motion_root: str, tmp_path: Path
) -> None:
    options = {"rank": 0, "after": 2, "once": tmp_path / "sent", "required_file": tmp_path / "out" / "checkpoints"}
    if during == "test":
        options["required_file"] = tmp_path / "out"
    fault = overrides("ctrl-c", "train" if during == "precise BN" else "val", **options)
    run = [*TINY, *WORKERS[workers], *fault, f"dataset.root={motion_root}", f"output_dir={tmp_path}/out"]
    run += ["schedule=baseline", "base.epochs=0.5", "base.lr_milestones=[]", f"train.enable={during != 'test'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, str(ROOT / "tools/run_net.py"), *run]
    with open("log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        code = process.wait(timeout=240)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    text = Path("log").read_text()
    assert (tmp_path / "sent").exists(), text
    assert code == 128 + signal.SIGINT, text
    step = 0 if during == "test" else 4
    assert text.splitlines()[-1] == f"stopped by SIGINT; run the same command to continue from step {step}"
    assert "Traceback" not in text
    assert "KeyboardInterrupt" not in text


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait until the condition holds, which must be before the process ends."""
    while not condition():
        assert process.poll() is None, Path("log").read_text()
        time.sleep(0.02)


@pytest.mark.parametrize("change", ["shrinks", "changes"])
def test_changed_data_are_refused_unless_checkpoint_strict_is_false(
    change: str, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(make_motion(motion_root, KNOBS), "data")
    common = [*(word for word in RUN if "knobs" not in word), "dataset=kinetics400", "dataset.num_classes=8"]
    run = [*common, "dataset.root=data", "output_dir=out", "train.evals_per_phase=0", "checkpoint.keep=100"]
    main(run)
    lines = Path("data/train.csv").read_text().splitlines()
    lines[0] = f"{lines[0].split()[0]} 7"
    Path("data/train.csv").write_text("\n".join(lines[:-10] if change == "shrinks" else lines))
    middle = Checkpoints(tmp_path / "out/checkpoints").steps()[2]
    again = [*run, f"resume=out/checkpoints/step_{middle:08d}.pt", "output_dir=again"]
    capsys.readouterr()
    line = error_line(main, again, capsys)
    assert "has another recipe, model, dataset or plan: " in line
    assert "dataset.train.fingerprint was " in line
    assert ("dataset.train.videos was 64, is 54" in line) == (change == "shrinks")
    main([*again, "checkpoint.strict=false"])
    out = capsys.readouterr().out
    assert f"resumed at step {middle} of" in out
    assert "warning: out/checkpoints/step_" in out
    assert max(metrics(tmp_path / "again")) > middle


def test_new_run_in_a_used_folder_archives_old_checkpoints_and_resumes_its_own(
    whole: Path, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, "out", symlinks=True)
    torch.save({"model": r2plus1d_small(8, width=4).state_dict()}, "weights.pt")
    run = [*RUN, f"dataset.root={motion_root}", "output_dir=out", "resume=never", "init_from=weights.pt"]
    error_line(main, [*run, *overrides("sigterm", rank=0, after=80, once="asked")], capsys, 128 + signal.SIGTERM)
    before, checkpoints = Checkpoints(whole / "checkpoints").steps(), Checkpoints(tmp_path / "out/checkpoints")
    assert Checkpoints(checkpoints.folder / "aside_1").steps() == before
    stopped = checkpoints.steps()[-1]
    assert 0 < stopped < before[-1]
    Path("weights.pt").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main(run)
    assert f"resumed at step {stopped} of" in capsys.readouterr().out
    assert checkpoints.steps()[-1] == before[-1]
    assert not (checkpoints.folder / "aside_2").exists()


@needs_decord
def test_keys_that_change_the_result_are_refused_and_micro_batches_are_kept(
    whole: Path, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(whole / "checkpoints")
    path = checkpoints.path(checkpoints.steps()[-2])
    run = [*RUN, f"dataset.root={motion_root}", "output_dir=out", f"resume={path}"]
    line = error_line(main, [*run, "precision=bf16", "train.precise_bn_clips=24", "decoder=decord"], capsys)
    for fragment in ("precision was fp32, is bf16", "train.precise_bn_clips was 16, is 24", "decoder._target_ was "):
        assert fragment in line
    line = error_line(main, [*run, "model.width=8", "checkpoint.strict=false"], capsys)
    assert "does not fit this network" in line
    main([*run, "train.micro_batch_clips=null"])
    newest, _ = Checkpoints(tmp_path / "out/checkpoints").find_newest()
    assert newest is not None
    assert read_checkpoint(newest)["micro_batch_clips"] == {"ranks": 1, "clips": 16}, (
        "the saved number, not what memory holds now"
    )
    assert end_state(tmp_path / "out") == end_state(whole)
    assert "warning" not in capsys.readouterr().out


def edit_checkpoint(path: Path, folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Write a copy of a checkpoint, changed by `edit`, into a new folder and return its path."""
    state = read_checkpoint(path)
    edit(state)
    folder.mkdir()
    copy = folder / path.name
    torch.save(state, copy)
    copy.with_suffix(".sha256").write_text(hashlib.sha256(copy.read_bytes()).hexdigest())
    return copy


def test_checkpoint_of_another_plan_is_refused_with_the_differences(
    whole: Path, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan may differ for the same recipe if the code has changed."""

    def shorten(state: dict[str, Any]) -> None:
        *_, before, last = state["plan"]["phases"]
        before["lr_factor"], last["steps"] = 7.0, (last["steps"][0], last["steps"][1] + 5)

    checkpoints = Checkpoints(whole / "checkpoints")
    last = checkpoints.steps()[-1]
    path = edit_checkpoint(checkpoints.path(checkpoints.steps()[-2]), tmp_path / "edited", shorten)
    run = [*RUN, f"dataset.root={motion_root}", "output_dir=out", f"resume={path}"]
    line = error_line(main, run, capsys)
    phases = len(read_checkpoint(path)["plan"]["phases"])
    assert f"the plan had {last + 5} steps in {phases} phases, has {last} in {phases}; phase {phases - 1} had " in line
    assert "LR ×7, has steps" in line
    main([*run, "checkpoint.strict=false"])
    assert f"the plan had {last + 5} steps" in capsys.readouterr().out
    assert max(metrics(tmp_path / "out")) == last


def test_other_software_versions_cause_a_warning(
    whole: Path, motion_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(whole / "checkpoints")
    versions = read_checkpoint(checkpoints.path(checkpoints.steps()[-2]))["versions"]
    assert versions["torch"] == str(torch.__version__)
    old = {"mgvideo": "0.0.1 (sources 00000000)", "torch": "2.0.0"}
    path = edit_checkpoint(
        checkpoints.path(checkpoints.steps()[-2]), tmp_path / "edited", lambda s: s.update(versions=old)
    )
    main([*RUN, f"dataset.root={motion_root}", "output_dir=out", f"resume={path}"])
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "written by other software versions" in warning
    for name in ("mgvideo", "torch"):
        assert f"{name} was {old[name]}, is {versions[name]}" in warning


@pytest.mark.parametrize(("measured", "is_kept"), [(1000, True), (13, True), (3, False)])
def test_resumed_run_keeps_its_micro_batch_clips_unless_memory_holds_fewer(
    measured: int, is_kept: bool, whole: Path, motion_root: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checkpoints = Checkpoints(whole / "checkpoints")
    path = checkpoints.path(checkpoints.steps()[-2])
    monkeypatch.setattr("mgvideo.cli.build.clips_that_fit", lambda *_: measured)
    main([*RUN[:-1], f"dataset.root={motion_root}", "output_dir=out", f"resume={path}"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    newest, _ = Checkpoints(tmp_path / "out/checkpoints").find_newest()
    assert newest is not None
    assert read_checkpoint(newest)["micro_batch_clips"] == {"ranks": 1, "clips": 16 if is_kept else measured}
    assert len(warnings) == (0 if is_kept else 1)
    if is_kept:
        assert end_state(tmp_path / "out") == end_state(whole)
    else:
        assert f"memory holds {measured} clips of the base grid at once now, 16 before" in warnings[0]


def test_network_that_draws_random_numbers_itself_is_refused(
    motion_root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*RUN, f"dataset.root={motion_root}", "output_dir=out", "model._target_=faults.network"]
    line = error_line(main, [*run, "+model.fault=dropout"], capsys)
    assert line.startswith("error: model: the network itself (FaultyNetwork) draws random numbers (")
    assert "use nn.Dropout as a layer" in line
