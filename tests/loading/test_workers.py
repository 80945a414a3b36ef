"""Worker processes with unusual settings of TMPDIR."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing import util
from pathlib import Path

import pytest
from training import ROOT

from mgvideo.errors import UserError
from mgvideo.loading import workers
from mgvideo.loading.workers import use_short_socket_paths

LOAD_PROGRAM = """
import tempfile
from multiprocessing import util
from test_loader import count_batches

print(count_batches({root!r}), tempfile.gettempdir(), util.get_temp_dir())
"""


@pytest.mark.parametrize("length", [71, 89])
@pytest.mark.slow
def test_a_long_tmpdir_holds_all_files_but_sockets(motion_root: str, length: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        folder = f"{parent}/x".ljust(length, "x")
        Path(folder).mkdir()
        environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": f"{ROOT}/tests/loading:{ROOT}/tests"}
        command = [sys.executable, "-c", LOAD_PROGRAM.format(root=motion_root)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    num_batches, temp_folder, socket_folder = result.stdout.split()
    assert (num_batches, temp_folder) == ("3", folder)
    assert socket_folder.startswith(folder) == (length <= 71)


def test_a_long_tmpdir_without_a_writable_short_folder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/".ljust(89, "x"))
    monkeypatch.setattr(workers, "_SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(UserError, match=r"TMPDIR=/x+ is too long .*: give a folder of at most 71 characters"):
        use_short_socket_paths()


def test_no_writable_folder_for_temporary_files_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(UserError, match=r"cannot create a folder for temporary files .*: set TMPDIR"):
        use_short_socket_paths()


def test_a_full_folder_for_temporary_files_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/".ljust(89, "x"))
    monkeypatch.setattr(util, "get_temp_dir", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"temporary files .No space left on device.: set TMPDIR"):
        use_short_socket_paths()
    assert tempfile.tempdir == "/".ljust(89, "x")
