"""What the environment does to worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest

from mgvideo.errors import UserError
from mgvideo.loading import workers
from mgvideo.loading.workers import use_short_socket_paths

READ = """
import tempfile
from multiprocessing import util
from test_loader import batches_read

print(batches_read({root!r}), tempfile.gettempdir(), util.get_temp_dir())
"""


@pytest.mark.parametrize("length", [71, 89])
def test_a_long_tmpdir_holds_everything_but_sockets(motion_root: str, length: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        folder = f"{parent}/x".ljust(length, "x")
        Path(folder).mkdir()
        environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", READ.format(root=motion_root)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    batches, temporary, sockets = done.stdout.split()
    assert (batches, temporary) == ("3", folder)
    assert sockets.startswith(folder) == (length <= 71)


def test_without_a_short_folder_tmpdir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/".ljust(89, "x"))
    monkeypatch.setattr(workers, "_SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(UserError, match=r"TMPDIR=/x+ is too long .*: give a folder of at most 71 characters"):
        use_short_socket_paths()


def test_without_any_folder_to_write_tmpdir_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(UserError, match=r"no folder for temporary files .*: set TMPDIR to one that has room"):
        use_short_socket_paths()


def test_a_full_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/".ljust(89, "x"))
    monkeypatch.setattr(util, "get_temp_dir", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"no folder for temporary files .No space left on device.: set TMPDIR"):
        use_short_socket_paths()
    assert tempfile.tempdir == "/".ljust(89, "x")
