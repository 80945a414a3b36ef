"""Files at URLs, from a real server: fetched once, never in part, and a one-line error if they do not exist."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training import KNOBS
from web import serve_folder

from mgvideo.datasets.decoders import Decord, PyAV
from mgvideo.datasets.folder import video_folder
from mgvideo.datasets.kinetics import kinetics
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.motion import make_motion
from mgvideo.datasets.pyramid import Pyramid, PyramidLayout, encode_pyramid
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid
from mgvideo.storage.paths import exists, explain_write_errors, join, local_copy, read_bytes, relative

GRID = Grid(4, 24, (1, 3), (28, 40))
CLOSED_PORT = "http://127.0.0.1:9"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served/a b").mkdir(parents=True)
    (tmp_path / "served/a b/視頻.txt").write_text("original")
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path, cache: Path) -> Iterator[tuple[str, list[str]]]:
    with serve_folder(folder) as address_and_requests:
        yield address_and_requests


def test_local_copy_fetches_once_and_read_bytes_is_not_cached(server: tuple[str, list[str]], folder: Path) -> None:
    address, requested = server
    url = f"{address}/a b/視頻.txt"
    copies = {local_copy(url) for _ in range(3)}
    assert len(copies) == len(requested) == 1
    assert Path(copies.pop()).read_text() == "original"
    (folder / "a b/視頻.txt").write_text("changed")
    assert read_bytes(url) == b"changed"
    assert exists(url)
    assert not exists(f"{address}/gone")


def test_copies_of_two_servers_differ_and_stay_inside_the_cache(tmp_path: Path, cache: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    with serve_folder(tmp_path / "one") as (first, _), serve_folder(tmp_path / "two") as (second, _):
        assert [Path(local_copy(f"{address}/x")).read_text() for address in (first, second)] == ["one", "two"]
        copy = Path(local_copy(f"{first}/../../../../x")).resolve()
    assert copy.is_relative_to(cache.resolve())


def test_a_failed_fetch_raises_its_reason_and_leaves_no_copy(server: tuple[str, list[str]], cache: Path) -> None:
    address, _ = server
    for url, reason in (
        (f"{address}/gone.mp4", "404"),
        (f"{address}/cut.mp4", "before the end"),
        (f"{CLOSED_PORT}/x", "refused"),
    ):
        with pytest.raises(OSError, match=reason) as caught:
            local_copy(url)
        assert caught.value.strerror
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_an_unknown_scheme_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gopher://x/y: gopher:// has no handler; use one of http://") as caught:
        local_copy("gopher://x/y")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"s3:// needs boto3 \(pip install 'mgvideo\[s3\]'\)"):
        read_bytes("s3://bucket/x")


def test_join_and_relative_of_relative_absolute_and_url_paths() -> None:
    assert join("/root", "a/b.mp4") == "/root/a/b.mp4"
    assert join("/root", "../b.mp4") == "/root/../b.mp4"
    assert join("/root", "/else/b.mp4") == join("file:///root", "file:///else/b.mp4") == "/else/b.mp4"
    assert join("file:///my%20root", "b.mp4") == "/my root/b.mp4"
    assert join("http://host/d", "b.mp4") == "http://host/d/b.mp4"
    assert join("/root", "https://host/b.mp4") == "https://host/b.mp4"
    for root in ("/root", "http://host/d"):
        for path in ("a/b.mp4", "../b.mp4", "https://other/b.mp4"):
            assert relative(join(root, path), root) == path
    assert relative("/else/b.mp4", "http://host/d") == "/else/b.mp4"


def test_a_list_may_name_paths_and_urls(server: tuple[str, list[str]], folder: Path, motion_root: str) -> None:
    address, _ = server
    videos = sorted(Path(make_motion(motion_root, KNOBS)).glob("train/*.mp4"))[:5]
    for video in videos:
        shutil.copy(video, folder / video.name)
    root = folder / "a b"
    lines = [f"../{videos[0].name}", str(videos[1]), f"file://{videos[2]}", f"{address}/{videos[3].name}"]
    (root / "list.csv").write_text("".join(f"{line} {label}\n" for label, line in enumerate(lines)))
    (folder / "plain.csv").write_text("".join(f"{video} {label}\n" for label, video in enumerate(videos[:4])))
    remote = video_list(str(root), "list.csv", decoder=PyAV())
    expected = video_list(str(folder), "plain.csv", decoder=PyAV())
    for index in range(4):
        request = ClipRequest(index, GRID, index)
        sample = remote[request]
        assert not sample.failures
        assert torch.equal(sample.clip, expected[request].clip)


def test_official_kinetics_list_is_refused_at_a_url(server: tuple[str, list[str]], folder: Path) -> None:
    (folder / "official.csv").write_text("label,youtube_id,time_start,time_end\nrun,abc,1,2\n")
    with pytest.raises(UserError, match="name them in a list file"):
        kinetics(server[0], "official.csv", 1)


@pytest.mark.parametrize("decoder", [PyAV(), Decord()])
def test_a_dataset_at_a_url_equals_the_local_one(
    server: tuple[str, list[str]], folder: Path, tmp_path: Path, motion_root: str, decoder: PyAV | Decord
) -> None:
    address, requested = server
    shutil.copytree(make_motion(motion_root, KNOBS), folder / "motion")
    (folder / "motion/train/00001.mp4").unlink()
    names = ["train/00000.mp4", "train/00002.mp4"]
    encode_pyramid(str(folder / "pyramid"), str(folder / "motion"), names, PyramidLayout((20, 40), 40), 1)
    local, remote = (
        video_list(root, "train.csv", decoder=Pyramid(pyramid, root, decoder))
        for root, pyramid in (
            (str(folder / "motion"), str(folder / "pyramid")),
            (f"{address}/motion", f"{address}/pyramid"),
        )
    )
    assert remote.fingerprint() == local.fingerprint()
    assert remote.class_names == local.class_names
    for index in (0, 1, 2, 5):
        request = ClipRequest(index, GRID, index)
        assert torch.equal(remote[request].clip, local[request].clip)
    (failure,) = remote[ClipRequest(1, GRID, 0, View(0, 1, 1))].failures
    assert failure.path == f"{address}/motion/train/00001.mp4"
    assert "404" in failure.reason
    assert any("/pyramid/short" in path for path in requested)
    assert "/motion/train/00000.mp4" not in requested, "only a pyramid level is read"


def test_split_tables_are_found_at_a_url(server: tuple[str, list[str]], folder: Path, motion_root: str) -> None:
    address, _ = server
    shutil.copy(next(Path(motion_root).rglob("00000.mp4")), folder / "clip.mp4")
    for split in ("train", "val"):
        (folder / f"{split}.csv").write_text("path,label\nclip.mp4,run\n")
    dataset = video_folder(address, "train", decoder=PyAV())
    assert not dataset[ClipRequest(0, GRID, 0)].failures
    (folder / "train.csv").unlink()
    (folder / "val.csv").unlink()
    with pytest.raises(UserError, match=r"give tables train\.csv and val\.csv"):
        video_folder(address, "train")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("out.csv", r"^cannot write out=out\.csv: No such file"),
        ("out.csv.part", r"^cannot write out=out\.csv: No such file"),
        ("out_classes.csv", r"^cannot write out=out\.csv: No such file"),
        (".out.part.csv", r"^cannot write out=out\.csv: No such file"),
        ("videos/a.mp4", r"^videos/a\.mp4: No such file"),
        ("train.csv", r"^train\.csv: No such file"),
    ],
)
def test_an_os_error_names_the_output_or_the_other_file(file: str, message: str) -> None:
    with pytest.raises(UserError, match=message), explain_write_errors("out", "out.csv"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", file)


def test_an_os_error_without_a_file_names_the_output_only_for_disk_errors() -> None:
    with (
        pytest.raises(UserError, match=r"^cannot write out=runs/a: No space left"),
        explain_write_errors("out", "runs/a"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"^cannot write out=runs/a: "), explain_write_errors("out", "runs/a"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "runs")
    with pytest.raises(BlockingIOError), explain_write_errors("out", "runs/a"):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
