"""Files behind URLs, from a real server: fetched once, never in part, and said in one line where they are not there."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from training import KNOBS
from web import served

from mgvideo.datasets.decoders import Decord, PyAV
from mgvideo.datasets.folder import video_folder
from mgvideo.datasets.kinetics import kinetics
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.motion import make_motion
from mgvideo.datasets.pyramid import Pyramid, PyramidLayout, encode_pyramid
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid
from mgvideo.storage.paths import exists, join, local, read_bytes, relative, writing

GRID = Grid(4, 24, (1, 3), (28, 40))
NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "served/a b").mkdir(parents=True)
    (tmp_path / "served/a b/視頻.txt").write_text("there")
    return tmp_path / "served"


@pytest.fixture
def server(folder: Path, cache: Path) -> Iterator[tuple[str, list[str]]]:
    with served(folder) as found:
        yield found


def test_a_copy_is_fetched_once_and_a_list_is_read_as_it_is_now(server: tuple[str, list[str]], folder: Path) -> None:
    address, asked = server
    url = f"{address}/a b/視頻.txt"
    copies = {local(url) for _ in range(3)}
    assert len(copies) == len(asked) == 1
    assert Path(copies.pop()).read_text() == "there"
    (folder / "a b/視頻.txt").write_text("changed")
    assert read_bytes(url) == b"changed"
    assert exists(url)
    assert not exists(f"{address}/gone")


def test_copies_of_two_servers_and_of_hostile_names_are_kept_apart(tmp_path: Path, cache: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    with served(tmp_path / "one") as (one, _), served(tmp_path / "two") as (two, _):
        assert [Path(local(f"{address}/x")).read_text() for address in (one, two)] == ["one", "two"]
        copy = Path(local(f"{one}/../../../../x")).resolve()
    assert copy.is_relative_to(cache.resolve())


def test_what_cannot_be_fetched_leaves_a_reason_and_no_copy(server: tuple[str, list[str]], cache: Path) -> None:
    address, _ = server
    for url, reason in (
        (f"{address}/gone.mp4", "404"),
        (f"{address}/cut.mp4", "before the end"),
        (f"{NOBODY}/x", "refused"),
    ):
        with pytest.raises(OSError, match=reason) as caught:
            local(url)
        assert caught.value.strerror
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_scheme_that_nobody_serves_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gopher://x/y: gopher:// is not served; there are http://") as caught:
        local("gopher://x/y")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"s3:// needs boto3 \(pip install 'mgvideo\[s3\]'\)"):
        read_bytes("s3://bucket/x")


def test_paths_in_a_list_are_relative_absolute_or_urls() -> None:
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


def test_a_list_reads_what_its_lines_name(server: tuple[str, list[str]], folder: Path, motion_root: str) -> None:
    address, _ = server
    videos = sorted(Path(make_motion(motion_root, KNOBS)).glob("train/*.mp4"))[:5]
    for video in videos:
        shutil.copy(video, folder / video.name)
    root = folder / "a b"
    lines = [f"../{videos[0].name}", str(videos[1]), f"file://{videos[2]}", f"{address}/{videos[3].name}"]
    (root / "list.csv").write_text("".join(f"{line} {label}\n" for label, line in enumerate(lines)))
    (folder / "plain.csv").write_text("".join(f"{video} {label}\n" for label, video in enumerate(videos[:4])))
    there = video_list(str(root), "list.csv", decoder=PyAV())
    expected = video_list(str(folder), "plain.csv", decoder=PyAV())
    for index in range(4):
        request = ClipRequest(index, GRID, index)
        sample = there[request]
        assert not sample.failures
        assert torch.equal(sample.clip, expected[request].clip)


def test_clips_behind_a_url_are_not_looked_for(server: tuple[str, list[str]], folder: Path) -> None:
    (folder / "official.csv").write_text("label,youtube_id,time_start,time_end\nrun,abc,1,2\n")
    with pytest.raises(UserError, match="name them in a list file"):
        kinetics(server[0], "official.csv", 1)


@pytest.mark.parametrize("decoder", [PyAV(), Decord()])
def test_a_dataset_on_a_server_is_the_same_as_at_hand(
    server: tuple[str, list[str]], folder: Path, tmp_path: Path, motion_root: str, decoder: PyAV | Decord
) -> None:
    address, asked = server
    shutil.copytree(make_motion(motion_root, KNOBS), folder / "motion")
    (folder / "motion/train/00001.mp4").unlink()
    names = ["train/00000.mp4", "train/00002.mp4"]
    encode_pyramid(str(folder / "pyramid"), str(folder / "motion"), names, PyramidLayout((20, 40), 40), 1)
    here, there = (
        video_list(root, "train.csv", decoder=Pyramid(pyramid, root, decoder))
        for root, pyramid in (
            (str(folder / "motion"), str(folder / "pyramid")),
            (f"{address}/motion", f"{address}/pyramid"),
        )
    )
    assert there.fingerprint() == here.fingerprint()
    assert there.class_names == here.class_names
    for index in (0, 1, 2, 5):
        request = ClipRequest(index, GRID, index)
        assert torch.equal(there[request].clip, here[request].clip)
    (failure,) = there[ClipRequest(1, GRID, 0, View(0, 1, 1))].failures
    assert failure.path == f"{address}/motion/train/00001.mp4"
    assert "404" in failure.reason
    assert any("/pyramid/short" in path for path in asked)
    assert "/motion/train/00000.mp4" not in asked, "a level of it is enough"


def test_a_table_on_a_server_is_found(server: tuple[str, list[str]], folder: Path, motion_root: str) -> None:
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
def test_an_error_over_a_file_names_the_output_or_the_other_file(file: str, message: str) -> None:
    with pytest.raises(UserError, match=message), writing("out", "out.csv"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", file)


def test_an_error_without_a_file_names_the_output_where_a_disk_is_full_and_is_raised_otherwise() -> None:
    with pytest.raises(UserError, match=r"^cannot write out=runs/a: No space left"), writing("out", "runs/a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"^cannot write out=runs/a: "), writing("out", "runs/a"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "runs")
    with pytest.raises(BlockingIOError), writing("out", "runs/a"):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
