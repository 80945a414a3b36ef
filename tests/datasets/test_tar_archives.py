"""Tar archives: the same clips as from the files that were packed, and every broken sample named and left out."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from videos import DECORD, read_number, write_video
from web import serve_folder, serve_s3

from mgvideo.datasets import listing
from mgvideo.datasets.charades import charades
from mgvideo.datasets.check import check
from mgvideo.datasets.decoders import Decord, PyAV, TorchCodec
from mgvideo.datasets.frame_cache import FrameCache
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.pack import pack
from mgvideo.datasets.packed_pyramid import PackedPyramid, open_pyramid
from mgvideo.datasets.pyramid import Pyramid, PyramidLayout, encode_pyramid
from mgvideo.datasets.remote import RemoteVideos
from mgvideo.datasets.shards import shards
from mgvideo.datasets.video import VideoDataset
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid
from mgvideo.storage import paths

GRID = Grid(frames=4, size=24, strides=(1, 3), scales=(28, 60))
MIB = 2**20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The videos of `root` in three archives of two, with two levels each."""
    folder = tmp_path_factory.mktemp("packed")
    names = [f"clips/video {i}.mp4" for i in range(6)]
    encode_pyramid(str(folder / "pyramid"), str(root), names, PyramidLayout((30, 60), 60), 1)
    pyramid = Pyramid(str(folder / "pyramid"), str(root), PyAV())
    size = max((root / name).stat().st_size for name in names)
    dataset = video_list(str(root), "list.csv", decoder=PyAV())
    results = pack({"train": dataset}, folder / "out", 3 * size, pyramid, 1)
    assert sum(shard.samples for shard in results) == 6
    assert len(results) >= 2
    return folder / "out"


def same_clips(dataset: VideoDataset, expected: VideoDataset, tolerance: float = 0.0) -> None:
    """Compare clips and labels; `tolerance` is the mean difference of pixels, in grey levels, that is allowed."""
    assert len(dataset) == len(expected)
    for index in range(len(expected)):
        for request in (ClipRequest(index, GRID, index), ClipRequest(index, GRID, 0, View(1, 3, 3))):
            sample, other = dataset[request], expected[request]
            assert not sample.failures
            assert (sample.clip.float() - other.clip.float()).abs().mean() <= tolerance
            assert torch.equal(sample.label, other.label)


@pytest.mark.parametrize("decoder", ["pyav", DECORD, "torchcodec"])
def test_archives_give_the_clips_of_the_files(root: Path, packed: Path, decoder: str) -> None:
    library = {"pyav": PyAV, "decord": Decord, "torchcodec": TorchCodec}[decoder]()
    dataset = shards(str(packed), "train-*.tar", decoder=library)
    assert dataset.class_names == ["walk", "run", "jump high"]
    assert not dataset.notes
    same_clips(dataset, video_list(str(root), "list.csv", decoder=library))


def test_levels_in_archives_are_read_as_those_of_a_pyramid(root: Path, packed: Path) -> None:
    loose = Pyramid(str(packed.parent / "pyramid"), str(root), PyAV())
    decoder = open_pyramid(str(packed), str(packed), PyAV())
    assert isinstance(decoder, PackedPyramid)
    dataset = shards(str(packed), "train-*.tar", decoder=decoder)
    same_clips(dataset, video_list(str(root), "list.csv", decoder=loose))
    located = [decoder.locate(dataset.path(1), side) for side in (28, 45, None)]
    assert [path.rpartition("/")[2] for path in located] == [
        "000000001.short30.mp4",
        "000000001.short60.mp4",
        "000000001.mp4",
    ]


def test_frame_cache_and_check_read_archives(packed: Path, tmp_path: Path) -> None:
    dataset = shards(str(packed), "train-*.tar", decoder=FrameCache(str(tmp_path / "frames"), PyAV(), 1))
    same_clips(dataset, shards(str(packed), "train-*.tar", decoder=PyAV()))
    assert check([dataset.path(i) for i in range(6)], processes=1) == []


@pytest.fixture
def remote(packed: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "http":
        with serve_folder(packed) as (address, _):
            yield address
    else:
        with serve_s3("videos") as (client, environment):
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            for file in packed.iterdir():
                client.upload_file(str(file), "videos", f"k400/{file.name}")
            getattr(paths._handlers.get("s3://"), "__dict__", {}).pop("client", None)  # of another server
            yield "s3://videos/k400"


@pytest.mark.parametrize("remote", ["http", "s3"], indirect=True)
@pytest.mark.parametrize("shipped", [True, False])
def test_archives_at_a_url_are_read_in_ranges(
    remote: str, packed: Path, tmp_path: Path, shipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in packed.glob("*.tar"))
    pattern = f"train-{{000000..{len(names) - 1:06d}}}.tar" if remote.startswith("http") else "train-*.tar"
    if not shipped:
        monkeypatch.setattr("mgvideo.datasets.shard_index.INDEX_FILE", "missing.index")
    local = shards(str(packed), "train-*.tar", decoder=PyAV())
    dataset = shards(remote, pattern, decoder=RemoteVideos(PyAV(), 1))
    same_clips(dataset, local)
    copies = [path for path in (tmp_path / "cache/mgvideo").glob("??/*") if not path.name.endswith(".index")]
    assert sorted(path.stat().st_size for path in copies) == sorted(
        int(local.entry(i).path.partition("+")[2].partition("/")[0]) for i in range(6)
    ), "only the videos were fetched, each once"


def test_a_pyramid_of_archives_is_built_like_one_of_files(root: Path, packed: Path, tmp_path: Path) -> None:
    dataset = shards(str(packed), "train-*.tar", decoder=PyAV())
    paths = [dataset.entry(i).path for i in range(6)]
    rows = encode_pyramid(str(tmp_path / "pyramid"), str(packed), paths, PyramidLayout((30, 60), 60), 1)
    assert [row.failure for row in rows] == [""] * 6
    assert [row.bytes for row in rows] == [(root / f"clips/video {i}.mp4").stat().st_size for i in range(6)]
    decoder = Pyramid(str(tmp_path / "pyramid"), str(packed), PyAV())
    loose = Pyramid(str(packed.parent / "pyramid"), str(root), PyAV())
    dataset, expected = (
        shards(str(packed), "train-*.tar", decoder=decoder),
        video_list(str(root), "list.csv", decoder=loose),
    )
    same_clips(dataset, expected, tolerance=1.0)  # encoded twice, with other rounding in rare cases
    (tmp_path / "list.csv").write_text("".join(f"{packed}/{path} {i % 3}\n" for i, path in enumerate(paths)))
    same_clips(video_list(str(tmp_path), "list.csv", decoder=PyAV()), video_list(str(root), "list.csv", decoder=PyAV()))


def test_any_dataset_can_be_packed_and_keeps_its_times(tmp_path: Path) -> None:
    for name in "AB":
        write_video(tmp_path / f"Charades_v1_480/{name}.mp4", frames=60)
    (tmp_path / "train.csv").write_text("id,actions\nA,c092 0.50 1.00;c147 0.00 4.00\nB,\n")
    original = charades(str(tmp_path), "train.csv", decoder=PyAV())
    pack({"train": original}, tmp_path / "out", MIB, processes=1)
    dataset = shards(str(tmp_path / "out"), "train-*.tar", decoder=PyAV())
    assert dataset.sampling == original.sampling
    assert dataset.timed_labels
    same_clips(dataset, original)


def test_a_stopped_pack_continues_and_leaves_out_bad_videos(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root, tmp_path / "data")
    (tmp_path / "data/clips/video 3.mp4").write_bytes(b"")
    (tmp_path / "data/clips/video 4.mp4").unlink()
    dataset = video_list(str(tmp_path / "data"), "list.csv", decoder=PyAV())
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("mgvideo.datasets.pack._verify", lambda part, digests: 1 / ("000000002.mp4" not in digests))
        with pytest.raises(ZeroDivisionError):
            pack({"train": dataset}, out, 1, processes=1)
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    before = (out / "train-000000.tar").stat().st_mtime_ns
    results = pack({"train": dataset}, out, 1, processes=1)
    assert (out / "train-000000.tar").stat().st_mtime_ns == before
    assert [(Path(path).name, reason) for shard in results for path, reason in shard.failures] == [
        ("video 3.mp4", "empty file"),
        ("video 4.mp4", "No such file or directory"),
    ]
    assert not list(out.glob(".*"))
    assert len(shards(str(out), "train-*.tar", decoder=PyAV())) == 4
    other = video_list(str(root), "list.csv", decoder=PyAV())
    with pytest.raises(UserError, match="holds archives of other videos"):
        pack({"val": other}, out, 1, processes=1)


def write_tar(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_video(tmp_path_factory.mktemp("one") / "v.mp4", frames=9, width=60).read_bytes()


def test_samples_of_other_tools(tmp_path: Path, video: bytes) -> None:
    """WebDataset's own files: folders, `./`, upper case, .cls and .txt, other files, names as labels."""
    write_tar(
        tmp_path / "a-00.tar",
        {
            "./x/000.mp4": video,
            "./x/000.txt": "walk\n",
            "x/001.MP4": video,
            "x/001.json": '{"cls": " run ", "caption": "two"}',
            "x/001.flow.npy": b"other",
            "._junk.mp4": b"",
            "y.z/002.mp4": video,
            "y.z/002.cls": "walk",
        },
    )
    dataset = shards(str(tmp_path), "a-{00..00}.tar", decoder=PyAV())
    assert dataset.class_names == ["run", "walk"]
    assert dataset.labels.tolist() == [1, 0, 1]
    assert dataset.sampling.flip
    clip = dataset[ClipRequest(2, Grid(3, 60, (1, 1), (60, 60)), 0, View(0, 1, 1))].clip[0]
    assert [read_number(frame) for frame in clip] == [3, 4, 5]
    (tmp_path / "classes.txt").write_text("walk\nsit\nrun\n")
    assert shards(str(tmp_path), "a-*.tar", decoder=PyAV()).labels.tolist() == [0, 2, 0]


def test_broken_samples_are_named_and_left_out(tmp_path: Path, video: bytes) -> None:
    good = {"000.mp4": video, "000.json": '{"label": 1}'}
    write_tar(
        tmp_path / "a.tar",
        {
            **good,
            "no-label.mp4": video,
            "no-video.json": '{"label": 1}',
            "two.mp4": video,
            "two.avi": video,
            "two.cls": "1",
            "text.mp4": video,
            "text.json": "[1",
            "name.mp4": video,
            "name.cls": "jump",
            "high.mp4": video,
            "high.cls": "9",
            "null.mp4": video,
            "null.json": '{"label": null}',
            "span.mp4": video,
            "span.json": '{"label": 1, "start": 3, "end": 2}',
            "last.mp4": video,
            "last.cls": "0",
        },
    )
    whole = write_tar(tmp_path / "b.tar", {"1.mp4": video, "1.cls": "0", "2.mp4": video, "2.cls": "0"}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: 3 * 1024 + len(video) + 600])  # within 2.mp4
    (tmp_path / "c.tar").write_text("not an archive" * 100)
    (tmp_path / "d.tar").write_bytes(b"")
    dataset = shards(str(tmp_path), "*.tar", num_classes=3, decoder=PyAV())
    assert [dataset.entry(i).path.rpartition("/")[2] for i in range(3)] == ["000.mp4", "last.mp4", "1.mp4"]
    assert len(dataset) == 3
    text = "\n".join(dataset.notes)
    for reason in (
        "no-label has no label",
        "no-video has no video",
        "two has 2 videos",
        "text.json is not a JSON object",
    ):
        assert reason in text
    for reason in ("b.tar: is cut off or damaged after 1 samples", "c.tar: is cut off or damaged", "d.tar: "):
        assert reason in text
    assert "samples left out: a.tar@" in text
    assert all(not dataset[ClipRequest(i, GRID, i)].failures for i in range(3))


def test_one_line_if_nothing_can_be_used(tmp_path: Path, video: bytes) -> None:
    with pytest.raises(UserError, match=r"no \.tar archives"):
        shards(str(tmp_path), "*.tar", decoder=PyAV())
    write_tar(tmp_path / "a.tar", {"0.mp4": video})
    with pytest.raises(UserError, match=r"no sample of a\.tar can be used: .*0 has no label"):
        shards(str(tmp_path), "a.tar", decoder=PyAV())
    with pytest.raises(UserError, match=r"no archives b-\*\.tar; it has a\.tar"):
        shards(str(tmp_path), "b-*.tar", decoder=PyAV())


def test_an_archive_that_changes_is_read_again_and_one_cut_later_is_a_bad_video(
    tmp_path: Path, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MIN_VIDEOS", 1)
    files: dict[str, bytes | str] = {"0.mp4": video, "0.cls": "0", "1.mp4": video, "1.cls": "1"}
    write_tar(tmp_path / "a.tar", files)
    assert len(shards(str(tmp_path), "*.tar", decoder=PyAV())) == 2
    write_tar(tmp_path / "a.tar", {"5.cls": "0", "5.mp4": video, **files})
    dataset = shards(str(tmp_path), "*.tar", decoder=PyAV())
    assert len(dataset) == len(shards(str(tmp_path), "*.tar", decoder=PyAV())) == 3
    write_tar(tmp_path / "b.tar", {"9.mp4": video, "9.json": json.dumps({"label": 1})})
    assert len(shards(str(tmp_path), "*.tar", decoder=PyAV())) == 4
    content = (tmp_path / "a.tar").read_bytes()
    offset = int(dataset.entry(2).path.partition("@")[2].partition("+")[0])
    (tmp_path / "a.tar").write_bytes(content[: offset + 100])
    sample = dataset[ClipRequest(2, GRID, 0, View(0, 1, 1))]
    assert "the archive ends at byte" in sample.failures[0].reason
    sample = dataset[ClipRequest(2, GRID, 0)]
    assert sample.index != 2
    assert sample.failures[0].index == 2
