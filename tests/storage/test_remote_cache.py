"""Local copies of remote videos: within a limit, shared by jobs, and never deleted while they are read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from videos import write_video
from web import serve_folder

from mgvideo.datasets.pyav import PyAV
from mgvideo.datasets.remote import RemoteVideos
from mgvideo.datasets.videofile import DecodeError
from mgvideo.storage.paths import local_copy
from mgvideo.storage.remote_cache import copy_path, limit_size, lock_copy

GIB = 2**30


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for number in range(8):
        write_video(tmp_path / f"served/{number}.mp4", frames=10 + number)
    with serve_folder(tmp_path / "served") as address_and_requests:
        yield address_and_requests


def copies(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in (folder / "cache/mgvideo").glob("??/*")}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "cache/mgvideo").glob("??/*"))


def test_copies_used_least_recently_are_deleted_first(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, requested = server
    size = (tmp_path / "served/0.mp4").stat().st_size
    limit = 4.5 * size
    decoder = RemoteVideos(PyAV(), limit / GIB)
    for number in (0, 1, 2, 0, 3, 0, 4, 0, 5, 0):
        decoder.open(f"{address}/{number}.mp4").close()
        assert size_of(tmp_path) <= limit + size, "checked before each new copy"
    assert requested.count("/0.mp4") == 1, "always the last or the one before"
    assert "0.mp4" in copies(tmp_path)
    assert "1.mp4" not in copies(tmp_path)
    size_file = tmp_path / "cache/mgvideo/size"
    assert int(size_file.read_text()) == size_of(tmp_path)
    size_file.write_text("damaged")
    decoder.open(f"{address}/6.mp4").close()
    assert int(size_file.read_text()) == size_of(tmp_path)


def test_a_copy_in_use_is_kept_and_its_video_readable(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    with RemoteVideos(PyAV(), 1).open(f"{address}/7.mp4") as video:
        local_copy(f"{address}/1.mp4")
        limit_size(1)
        assert copies(tmp_path) == {"7.mp4"}
        frames = video.read(range(17))
    expected = PyAV().open(str(tmp_path / "served/7.mp4")).read(range(17))
    assert torch.equal(frames, expected)
    del video
    limit_size(1)
    assert not copies(tmp_path)


def test_a_copy_that_another_job_deletes_at_once_is_fetched_again(
    server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, requested = server
    deletions = iter((True, True, False))

    def delete_first(copy: str) -> object:
        if next(deletions):
            os.unlink(copy)
        return lock_copy(copy)

    monkeypatch.setattr("mgvideo.datasets.remote.lock_copy", delete_first)
    assert RemoteVideos(PyAV(), 1).open(f"{address}/0.mp4").frames == 10
    assert requested.count("/0.mp4") == 3
    monkeypatch.setattr("mgvideo.datasets.remote.lock_copy", lambda copy: None)
    with pytest.raises(DecodeError, match=r"1\.mp4: .*raise dataset\.cache_gib"):
        RemoteVideos(PyAV(), 1).open(f"{address}/1.mp4")


JOB = """
import sys
from mgvideo.datasets.pyav import PyAV
from mgvideo.datasets.remote import RemoteVideos
decoder = RemoteVideos(PyAV(), float(sys.argv[2]))
for turn in range(12):
    number = (turn * int(sys.argv[3])) % 8
    with decoder.open(f"{sys.argv[1]}/{number}.mp4") as video:
        assert len(video.read([0, 5, 9])) == 3
        assert video.frames == 10 + number
"""


def test_two_jobs_share_a_cache_smaller_than_their_videos(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    limit = 3.2 * (tmp_path / "served/0.mp4").stat().st_size
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, address, str(limit / GIB), step], stderr=subprocess.PIPE, text=True
        )
        for step in ("1", "3")
    ]
    for job in jobs:
        assert job.communicate()[1] == ""
        assert job.returncode == 0
    assert int((tmp_path / "cache/mgvideo/size").read_text()) == size_of(tmp_path)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_copy_outside_any_limit_is_counted(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    local_copy(f"{address}/0.mp4")
    limit_size(None)
    assert copy_path(f"{address}/0.mp4").exists()
    assert int((tmp_path / "cache/mgvideo/size").read_text()) == size_of(tmp_path)
