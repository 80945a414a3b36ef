import hashlib
import os
from pathlib import Path

import pytest
import torch

from mgvideo.errors import UserError
from mgvideo.storage.checkpoints import Checkpoints, differences, read_checkpoint


def state(step: int) -> dict:
    return {"weights": torch.full((3,), float(step)), "progress": {"step": step}}


def test_saves_off_the_path_and_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30, 40):
        weights = state(step)
        checkpoints.save(step, weights, best=step == 10)
        weights["weights"].zero_()  # training goes on while the file is written
    checkpoints.wait()
    assert checkpoints.steps() == [10, 30, 40]
    newest, warnings = checkpoints.newest()
    assert newest is not None
    assert read_checkpoint(newest)["weights"].tolist() == [40.0] * 3
    assert not warnings
    assert read_checkpoint(checkpoints.best)["progress"]["step"] == 10


@pytest.mark.parametrize("damage", ["truncate", "flip", "no digest", "digest of bytes", "no archive"])
def test_a_damaged_newest_is_named_and_the_one_before_used(tmp_path: Path, damage: str) -> None:
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
    newest, warnings = checkpoints.newest()
    assert newest == checkpoints.path(10)
    assert len(warnings) == 1
    assert path.stem in warnings[0]


def test_reading_runs_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path(tmp_path / "exploded").touch, ()

    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"bomb": Bomb()})
    checkpoints.wait()
    with pytest.raises(UserError, match="more than tensors"):
        read_checkpoint(checkpoints.path(1))
    assert not (tmp_path / "exploded").exists()


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    checkpoints.save(1, state(1))
    with pytest.raises(UserError, match="cannot make"):
        checkpoints.wait()


def test_a_checkpoint_is_whole_at_every_moment_of_its_replacement(tmp_path: Path) -> None:
    """As a process that is killed between any two of its writes leaves it."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, state(1))
    checkpoints.wait()
    files = [checkpoints.path(1), checkpoints.path(1).with_suffix(".sha256")]
    first = [file.read_bytes() for file in files]
    checkpoints.save(1, state(2))
    checkpoints.wait()
    second = [file.read_bytes() for file in files]
    files[0].write_bytes(first[0])  # killed before the new one was in its place, and once more when it is repeated
    checkpoints.save(1, state(3))
    checkpoints.wait()
    third = [file.read_bytes() for file in files]
    moments = [(first[0], first[1]), (first[0], second[1]), (second[0], second[1])]
    for data, digests in (*moments, (first[0], third[1]), (third[0], third[1])):
        files[0].write_bytes(data)
        files[1].write_bytes(digests)
        assert checkpoints.newest() == (files[0], [])


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "step_00000007.pt.tmp").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(8, state(8))
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000008.pt", "step_00000008.sha256"]


def test_what_a_run_does_not_go_on_from_is_moved_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save(step, state(step), best=step == 20)
    checkpoints.wait()
    assert checkpoints.rewind(30, 20) is None
    told = checkpoints.rewind(10)
    assert "step_00000020.pt, step_00000030.pt" in str(told)
    assert checkpoints.steps() == [10]
    checkpoints.save(15, state(15), best=True)
    checkpoints.wait()
    assert checkpoints.steps() == [10, 15], "none that is newer by step alone takes its place"
    old = Checkpoints(tmp_path / "checkpoints/aside_1")
    assert old.steps() == [20, 30]
    assert read_checkpoint(old.best)["progress"]["step"] == 20
    assert "aside_2" in str(checkpoints.rewind(0))
    assert not checkpoints.steps()
    assert not checkpoints.best.exists()


def test_a_link_to_the_best_that_a_kill_came_before_is_made_good(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20):
        checkpoints.save(step, state(step), best=step == 10)
    checkpoints.wait()
    checkpoints.rewind(20, best_step=20)
    assert checkpoints.best.resolve() == checkpoints.path(20)


def test_weights_are_no_checkpoint_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="init_from"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="init_from"):
        read_checkpoint(path.rename(tmp_path / "weights.pth"))


def test_differences_name_keys_and_values() -> None:
    assert differences({"base.lr": 0.1, "seed": 0, "gone": 1}, {"base.lr": 0.2, "seed": 0, "new": None}) == [
        "base.lr was 0.1, is 0.2",
        "gone was 1, is not there",
    ]
