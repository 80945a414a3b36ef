"""Test the packet index: clips are the same with it, and nothing that happens to its file stops a run."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import tarfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from fields import FIELD, NUMBERS
from torch import Tensor
from videos import create_bad_files, write_odd_files, write_rotated, write_video

from mgvideo.datasets import packet_index
from mgvideo.datasets.decoders import DecodeError, Decord, PyAV, TorchCodec
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.packet_index import PacketIndex, folder_index
from mgvideo.datasets.pyav import PyAVVideo
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.plan import Grid
from mgvideo.storage.members import Member

WITH_CONTAINER = {"raw.h264", "mpeg-2.mpg", "mpeg-1.m1v", "interlaced.ts", "stream.ts"}  # packets are not stored whole


@pytest.fixture(autouse=True)
def _print_again() -> None:
    packet_index._printed.clear()


def indexed(path: Path, indexes: Mapping[str, PacketIndex]) -> PyAVVideo:
    """Open a video from an index that has it."""
    PyAV(indexes=indexes).open(str(path)).close()
    return PyAV(indexes=indexes).open(str(path))


def check_same(path: Path, video: PyAVVideo) -> None:
    """Compare all that `video` reads with what is read without an index."""
    with PyAV().open(str(path)) as plain, video:
        assert (video.frames, video.height, video.width) == (plain.frames, plain.height, plain.width)
        assert np.array_equal(video.times, plain.times)
        assert (video.rate, video.simple, video.interlaced) == (plain.rate, plain.simple, plain.interlaced)
        frames = plain.read(range(plain.frames))
        for index in random.Random(0).sample(range(video.frames), min(video.frames, 25)):
            assert torch.equal(video.read([index])[0], frames[index]), index
        assert torch.equal(video.read(range(video.frames)), frames)


def test_odd_files_are_read_alike(tmp_path: Path) -> None:
    files = {**write_odd_files(tmp_path), "rotated": write_rotated(tmp_path / "rotated.mp4", frames=8)}
    indexes = folder_index(str(tmp_path))
    without_container = set()
    for name, path in files.items():
        video = indexed(path, indexes)
        check_same(path, video)
        without_container |= {name} if video.facts.packets is not None and video.container is None else set()
    assert without_container == files.keys() - WITH_CONTAINER
    assert [len(index) for index in indexes.values()] == [len(files)]


@pytest.mark.parametrize("name", NUMBERS)
def test_typical_files_are_read_alike(tmp_path: Path, name: str) -> None:
    check_same(FIELD / name, indexed(FIELD / name, {"/": PacketIndex(str(tmp_path / "index"))}))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_members_of_archives_are_read_alike(tmp_path: Path, suffix: str) -> None:
    names, archive = ["first", "second"], tmp_path / "shard.tar"
    with tarfile.open(archive, "w") as tar:
        for seconds, name in enumerate(names, start=1):
            tar.add(write_video(tmp_path / f"{name}.{suffix}", 12 * seconds), f"{name}.{suffix}")
    with tarfile.open(archive) as tar:
        members = [Member(str(archive), info.offset_data, info.size, info.name) for info in tar]
    indexes = folder_index(str(tmp_path))
    for member in members:
        with PyAV(indexes=indexes).open(member.path) as first:
            assert first.facts.packets is not None
    for member, name in zip(members, names, strict=True):
        with PyAV(indexes=indexes).open(member.path) as video, PyAV().open(str(tmp_path / f"{name}.{suffix}")) as plain:
            assert video.container is None
            assert torch.equal(video.read(range(video.frames)), plain.read(range(plain.frames)))
            assert video.container is None, "no packet was missed"


@pytest.mark.parametrize("decoder", [Decord, TorchCodec])
def test_libraries_open_files_from_the_index(tmp_path: Path, decoder: Any) -> None:
    path, reader = write_video(tmp_path / "a.mp4", 20, 84, 96), decoder()
    reader.indexes = folder_index(str(tmp_path))
    for _ in range(2):
        with reader.open(str(path)) as video, PyAV().open(str(path)) as plain:
            assert torch.equal(video.read([3, 17]), plain.read([3, 17]))


def test_only_the_packets_of_a_clip_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 200, options={"g": "20"})
    indexes, read = folder_index(str(tmp_path)), []
    with PyAV().open(str(path)) as plain:
        frames = plain.read([100, 105])
    PyAV(indexes=indexes).open(str(path)).close()
    monkeypatch.setattr(av, "open", None)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: read.append(size) or pread(file, size, offset))
    with PyAV(indexes=indexes).open(str(path)) as video:
        assert torch.equal(video.read([100, 105]), frames)
    assert len(read) < 20
    assert sum(read) < path.stat().st_size / 5


def test_packets_that_have_moved_are_read_from_the_container(tmp_path: Path) -> None:
    """The file has the same size and time of change, but other content."""
    first = write_video(tmp_path / "a.mp4", 20, options={"g": "5"})
    status, size = first.stat(), first.stat().st_size
    video = indexed(first, folder_index(str(tmp_path)))
    with PyAV().open(str(first)) as plain:
        frames = plain.read(range(20))
    content = first.read_bytes()
    free = content.index(b"mdat") - 4
    moov = content.index(b"moov") - 4
    assert moov > free
    first.write_bytes(content[:free] + bytes(moov - free) + content[moov:])
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert first.stat().st_size == size
    with video, pytest.raises(DecodeError):
        video.read([3])
    first.write_bytes(content)
    with PyAV(indexes=folder_index(str(tmp_path))).open(str(first)) as video:
        assert torch.equal(video.read(range(20)), frames)


def test_changed_file_is_indexed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, indexes = write_video(tmp_path / "a.mp4", 10), folder_index(str(tmp_path))
    indexed(path, indexes).close()
    write_video(path, 25)
    with PyAV(indexes=indexes).open(str(path)) as video:
        assert (video.frames, video.container is None) == (25, False)
    with PyAV(indexes=indexes).open(str(path)) as video:
        assert (video.frames, video.container) == (25, None)
    assert f"note: {path} has changed since it was indexed in {tmp_path}/.mgvideo/packets" in capsys.readouterr().err
    assert len(indexes[str(tmp_path)]) == 1


def damage(kind: str, file: Path) -> None:
    content = file.read_bytes()
    file.unlink()  # a process may have mapped it
    record = content.index(b'{"key"')
    file.write_bytes(
        {
            "empty": b"",
            "text": b"not an index" * 1000,
            "cut in the table": content[:1000],
            "cut in a record": content[: record + 40],
            "header": b"x" + content[1:],
            "table": content[:8] + b"\xff" * 16 + content[24:],
            "slots": content[:32] + b"\x07" * 4096 + content[4128:],
            "record": content[: record + 20] + b"#####" + content[record + 25 :],
        }[kind]
    )


@pytest.mark.parametrize(
    "kind", ["empty", "text", "cut in the table", "cut in a record", "header", "table", "slots", "record"]
)
def test_damaged_index_is_built_again(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    paths = [write_video(tmp_path / f"{name}.mp4", 10) for name in "ab"]
    for path in paths:
        indexed(path, folder_index(str(tmp_path))).close()
    damage(kind, tmp_path / ".mgvideo/packets.index")
    indexes = folder_index(str(tmp_path))
    indexes[str(tmp_path)].check()
    for path in paths:
        check_same(path, indexed(path, indexes))
        with PyAV(indexes=indexes).open(str(path)) as video:
            assert video.container is None
    err = capsys.readouterr().err
    assert kind == "slots" or f"{tmp_path}/.mgvideo/packets.index" in err, "unknown hashes are only missing"
    assert all(line.startswith("warning: ") for line in err.splitlines())


def test_folder_that_cannot_be_written_needs_no_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_video(tmp_path / "a.mp4", 10)
    indexes = {"/": PacketIndex(str(path / "index"))}
    for _ in range(2):
        check_same(path, indexed(path, indexes))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: {path}/index cannot be written: ")
    assert line.endswith("; videos stay without index")


def test_bad_files_have_the_same_reasons(tmp_path: Path) -> None:
    indexes = folder_index(str(tmp_path))
    for path in create_bad_files(tmp_path).values():
        with pytest.raises(DecodeError) as plain:
            PyAV().open(str(path))
        for _ in range(2):
            with pytest.raises(DecodeError) as caught:
                PyAV(indexes=indexes).open(str(path))
            assert caught.value.reason == plain.value.reason


def test_index_moves_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "old/deep/a.mp4", 10)
    indexed(path, folder_index(str(tmp_path / "old"))).close()
    shutil.move(tmp_path / "old", tmp_path / "new")
    monkeypatch.setattr(av, "open", None)
    with PyAV(indexes=folder_index(str(tmp_path / "new"))).open(str(tmp_path / "new/deep/a.mp4")) as video:
        assert video.read([9]).shape == (1, 60, 80, 3)


def _add_many(arguments: tuple[PacketIndex, range]) -> None:
    index, numbers = arguments
    for number in numbers:
        path = os.path.join(index.folder, "files", str(number))
        index.add(path, os.stat(path), {"number": number}, {"array": np.arange(number % 7)})


def test_processes_share_and_extend_an_index(tmp_path: Path) -> None:
    """The first table has 256 slots. All processes write some of the same keys."""
    (tmp_path / "files").mkdir()
    for number in range(600):
        (tmp_path / "files" / str(number)).touch()
    index = folder_index(str(tmp_path))[str(tmp_path)]
    assert index.find(str(tmp_path / "files/3")) is None
    parts = [range(0, 220), range(200, 420), range(400, 600)]
    with ProcessPoolExecutor(3, get_context("fork")) as pool:
        list(pool.map(_add_many, [(pickle.loads(pickle.dumps(index)), part) for part in parts]))
    for number in range(600):
        found = index.find(str(tmp_path / "files" / str(number)))
        assert found is not None
        assert (found[0]["number"], found[1]["array"].tolist()) == (number, list(range(number % 7)))
    assert len(index) == 600
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mgvideo", "files"]


def test_training_reads_the_same_clips_with_an_index(root: Path, tmp_path: Path) -> None:
    clips: list[list[Tensor]] = []
    for indexes in ({}, {"/": PacketIndex(str(tmp_path / "index"))}, {"/": PacketIndex(str(tmp_path / "index"))}):
        dataset = video_list(str(root), "list.csv", num_classes=3, decoder=PyAV(indexes=indexes))
        grid = Grid(4, 48, (2, 6), (52, 70))
        clips.append([dataset[ClipRequest(video, grid, seed)].clip for seed in range(3) for video in range(6)])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*clips, strict=True))
