"""Checkpoints: written in the background, verified on reading, archived before a run resumes from an older one."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from training import start_process

from mgvideo.errors import UserError
from mgvideo.storage.checkpoints import Checkpoints, describe_differences, lock_run_folder, read_checkpoint


def state(step: int) -> dict:
    return {"weights": torch.full((3,), float(step)), "progress": {"step": step}}


def test_saves_in_the_background_and_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30, 40):
        weights = state(step)
        checkpoints.save(step, weights, best=step == 10)
        weights["weights"].zero_()  # training goes on while the file is written
    checkpoints.wait()
    assert checkpoints.steps() == [10, 30, 40]
    newest, warnings = checkpoints.find_newest()
    assert newest is not None
    assert read_checkpoint(newest)["weights"].tolist() == [40.0] * 3
    assert not warnings
    assert read_checkpoint(checkpoints.best)["progress"]["step"] == 10


@pytest.mark.parametrize("damage", ["truncate", "flip", "no digest", "digest of bytes", "no archive"])
def test_a_damaged_newest_checkpoint_is_named_and_skipped(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    path = checkpoints.path(20)
    if damage == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "digest of bytes":
        path.with_suffix(".sha256").write_bytes(b"\xff" * 64)
    elif damage == "no archive":
        path.write_bytes(b"\x80\x02")
        path.with_suffix(".sha256").write_text(hashlib.sha256(b"\x80\x02").hexdigest())
    else:
        path.with_suffix(".sha256").unlink()
    newest, warnings = checkpoints.find_newest()
    assert newest == checkpoints.path(10)
    assert len(warnings) == 1
    assert path.stem in warnings[0]


def test_reading_runs_no_pickled_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path(tmp_path / "exploded").touch, ()

    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"bomb": Bomb()})
    checkpoints.wait()
    with pytest.raises(UserError, match="more than tensors"):
        read_checkpoint(checkpoints.path(1))
    assert not (tmp_path / "exploded").exists()


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    checkpoints.save(1, state(1))
    with pytest.raises(UserError, match="cannot create"):
        checkpoints.wait()


def test_a_checkpoint_is_readable_at_every_moment_of_its_replacement(tmp_path: Path) -> None:
    """Imitate the files that a process leaves when it is killed between any two of its writes."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(1))
    checkpoints.wait()
    files = [checkpoints.path(1), checkpoints.path(1).with_suffix(".sha256")]
    first = [file.read_bytes() for file in files]
    checkpoints.save(1, state(2))
    checkpoints.wait()
    second = [file.read_bytes() for file in files]
    files[0].write_bytes(first[0])  # killed before it replaced the checkpoint, and killed again in the next attempt
    checkpoints.save(1, state(3))
    checkpoints.wait()
    third = [file.read_bytes() for file in files]
    moments = [(first[0], first[1]), (first[0], second[1]), (second[0], second[1])]
    for data, digests in (*moments, (first[0], third[1]), (third[0], third[1])):
        files[0].write_bytes(data)
        files[1].write_bytes(digests)
        assert checkpoints.find_newest() == (files[0], [])


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "step_00000007.pt.tmp").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(8, state(8))
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000008.pt", "step_00000008.sha256"]


def test_checkpoints_after_the_resumed_step_are_archived(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save(step, state(step), best=step == 20)
    checkpoints.wait()
    assert checkpoints.archive_newer(30, 20) is None
    message = checkpoints.archive_newer(10)
    assert "step_00000020.pt, step_00000030.pt" in str(message)
    assert checkpoints.steps() == [10]
    checkpoints.save(15, state(15), best=True)
    checkpoints.wait()
    assert checkpoints.steps() == [10, 15], "an archived checkpoint of a later step must not replace it"
    archived = Checkpoints(tmp_path / "checkpoints/aside_1")
    assert archived.steps() == [20, 30]
    assert read_checkpoint(archived.best)["progress"]["step"] == 20
    assert "aside_2" in str(checkpoints.archive_newer(0))
    assert not checkpoints.steps()
    assert not checkpoints.best.exists()


def test_a_missing_link_to_the_best_checkpoint_is_restored(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, state(step), best=step == 10)
    checkpoints.wait()
    checkpoints.archive_newer(20, best_step=20)
    assert checkpoints.best.resolve() == checkpoints.path(20)


def test_a_weights_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="init_from"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="init_from"):
        read_checkpoint(path.rename(tmp_path / "weights.pth"))


def test_differences_name_keys_and_values() -> None:
    assert describe_differences({"base.lr": 0.1, "seed": 0, "gone": 1}, {"base.lr": 0.2, "seed": 0, "new": None}) == [
        "base.lr was 0.1, is 0.2",
        "gone was 1, is not set",
    ]


def test_a_locked_folder_is_refused_and_names_its_holder(tmp_path: Path) -> None:
    holder = f"process {os.getpid()} on "
    with (
        lock_run_folder(tmp_path),
        pytest.raises(UserError, match=rf"output_dir={tmp_path} is in use by another run \({holder}"),
        lock_run_folder(tmp_path),
    ):
        pass
    with lock_run_folder(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(holder)


def fork_and_die(folder: Path) -> None:
    """Lock a folder, fork a process that outlives this one, print its PID, and kill this process."""
    with lock_run_folder(folder):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        print(child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_forked_worker_does_not_hold_the_lock_of_a_killed_run(tmp_path: Path) -> None:
    start_process(fork_and_die, tmp_path, log=tmp_path / "log").join()
    child = int((tmp_path / "log").read_text())
    try:
        with lock_run_folder(tmp_path):
            os.kill(child, 0)  # it still runs
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_used_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_run_folder(tmp_path), lock_run_folder(tmp_path):
        pass
