"""Test pyramids: levels have the same frames, and readers open the right level."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import read_number, write_rotated, write_video

from mgvideo.datasets import pyramid as pyramid_module
from mgvideo.datasets.decoders import Decord, PyAV, TorchCodec
from mgvideo.datasets.lists import video_list
from mgvideo.datasets.pyramid import Pyramid, PyramidLayout, encode_pyramid, level_path, name_video
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, View
from mgvideo.plan.plan import Grid

LAYOUT = PyramidLayout(sides=(40, 60, 80), largest=100)
PATHS = ["deep/a.mp4", "b frames.mkv", "late.mp4", "odd.mp4"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    write_video(root / "deep/a.mp4", height=80, width=120)
    write_video(root / "b frames.mkv", height=80, width=120, options={"bf": "3", "b_strategy": "0", "g": "250"})
    write_video(root / "late.mp4", height=120, width=80, times=lambda i: i + i // 5 + 31)
    write_video(root / "odd.mp4", height=51, width=75, pix_fmt="yuv444p")
    (root / "list.csv").write_text("".join(f"{path} 0\n" for path in PATHS))
    return root


@pytest.fixture(scope="module")
def pyramid(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pyramid")
    encode_pyramid(str(folder), str(originals), PATHS, LAYOUT, processes=1)
    return folder


def test_layout_for_sizes_of_a_plan() -> None:
    assert PyramidLayout.for_sizes([224, 158, 112, 224], (256, 320), original=256) == PyramidLayout(
        (128, 182, 256), 320
    )
    assert PyramidLayout.for_sizes([224, 158, 112], (256, 320), original=1080).sides == (160, 226, 320)


@pytest.mark.parametrize("name", PATHS)
def test_levels_have_every_frame_at_their_size(originals: Path, pyramid: Path, name: str) -> None:
    with PyAV().open(str(originals / name)) as video:
        short, times = min(video.height, video.width), video.times
    for side in LAYOUT.sides:
        with PyAV().open(level_path(str(pyramid), side, name)) as level:
            assert abs(min(level.height, level.width) - min(side, short)) <= 1
            assert level.frames == 40
            assert level.times == pytest.approx(times, abs=1e-6)
            assert [read_number(frame) for frame in level.read(range(40))] == list(range(40))


@pytest.mark.parametrize(
    ("name", "drawn", "side"),
    [
        ("deep/a.mp4", 40, 40),
        ("deep/a.mp4", 50, 40),  # an original of 80 is enlarged 1.25 times for the base's 100
        ("deep/a.mp4", 51, 60),
        ("deep/a.mp4", 100, 80),
        ("odd.mp4", 100, 60),  # the largest level
        ("deep/a.mp4", 101, None),
        ("gone.mp4", 40, None),
    ],
)
def test_reader_opens_the_smallest_sharp_level(
    originals: Path, pyramid: Path, name: str, drawn: int, side: int | None
) -> None:
    opened = []

    class Spy(PyAV):
        def open(self, path: str, short_side: int | None = None):  # type: ignore[no-untyped-def]
            opened.append(path)
            return PyAV().open(str(originals / "deep/a.mp4"), short_side)

    path = str(originals / name)
    Pyramid(str(pyramid), str(originals), Spy()).open(path, drawn)
    assert opened == [path if side is None else level_path(str(pyramid), side, name)]


@pytest.mark.parametrize("decoder", [PyAV(), Decord()])
def test_clips_are_the_same_with_a_pyramid(originals: Path, pyramid: Path, decoder: PyAV | Decord) -> None:
    plain = video_list(str(originals), "list.csv", decoder=decoder, flip=False)
    fast = video_list(str(originals), "list.csv", decoder=Pyramid(str(pyramid), str(originals), decoder), flip=False)
    grid = Grid(6, 40, (2, 5), (40, 56))
    for index in range(len(PATHS)):
        view = ClipRequest(index, grid, 0, View(1, 3, 3))
        a, b = (dataset[view].clip[1].float() for dataset in (plain, fast))
        assert (a - b).abs().mean() < 4
        assert plain[view].failures == fast[view].failures == ()


BT709 = {"colorspace": 1, "color_range": 1, "color_primaries": 1, "color_trc": 1}
FULL = {"color_range": 2}


def vivid(number: int, height: int, width: int) -> np.ndarray:
    """Draw a frame in one strong colour, which BT.709 and BT.601 convert differently."""
    return np.full((height, width, 3), [(220, 30, 30), (30, 200, 30), (30, 30, 220), (245, 245, 245)][number], np.uint8)


@pytest.mark.parametrize(
    ("colours", "pix_fmt"),
    [(BT709, "yuv420p"), (BT709, "yuv444p"), (FULL, "yuv420p"), (FULL, "yuvj420p"), ({**BT709, **FULL}, "yuvj420p")],
)
@pytest.mark.parametrize("decoder", [PyAV(), Decord(), TorchCodec()])
def test_colours_are_the_same_with_a_pyramid(
    tmp_path: Path, colours: dict[str, int], pix_fmt: str, decoder: PyAV | Decord | TorchCodec
) -> None:
    root, folder = str(tmp_path / "root"), str(tmp_path / "pyramid")
    name = "a.mp4"
    written = {"pix_fmt": pix_fmt, "options": {"crf": "5"}, "colours": colours, "picture": vivid}
    write_video(tmp_path / "root" / name, 4, 100, 150, **written)  # type: ignore[arg-type]
    encode_pyramid(folder, root, [name], PyramidLayout(sides=(100,), largest=100), processes=1)
    pictures = []
    for opener in (decoder, Pyramid(folder, root, decoder)):
        with opener.open(str(tmp_path / "root" / name), 100) as video:
            pictures.append(video.read(range(4)).float().mean((1, 2)))
    torch.testing.assert_close(*pictures, rtol=0, atol=3)
    with PyAV().open(level_path(folder, 100, name)) as video:
        fields = {field: getattr(video.frame, field) for field in colours}
    assert fields == colours


def test_levels_of_a_rotated_video_are_upright(tmp_path: Path) -> None:
    root, folder = tmp_path / "root", str(tmp_path / "pyramid")
    root.mkdir()
    write_rotated(root / "a.mp4", height=80, width=120)
    (row,) = encode_pyramid(folder, str(root), ["a.mp4"], LAYOUT, processes=1)
    assert (row.failure, row.short_side) == ("", 80)
    with (
        Pyramid(folder, str(root), PyAV()).open(str(root / "a.mp4"), 40) as level,
        PyAV().open(str(root / "a.mp4"), 40) as video,
    ):
        assert (level.path, level.height, level.width) == (level_path(folder, 40, "a.mp4"), 60, 40)
        small, large = level.read([30]).float(), video.read([30]).float()
    assert (small - large[:, ::2, ::2]).abs().mean() < 8


@pytest.mark.parametrize("is_absolute", [True, False])
def test_videos_outside_the_root_have_levels_named_after_their_absolute_path(
    is_absolute: bool, originals: Path, tmp_path: Path
) -> None:
    root, folder = tmp_path / "lists", tmp_path / "levels"
    write_video(root / "inside.mp4", height=80, width=120)
    outside = originals / "deep/a.mp4"
    listed = str(outside) if is_absolute else os.path.relpath(outside, root)
    (root / "list.csv").write_text(f'"{listed}" 0\ninside.mp4 0\n')
    rows = encode_pyramid(str(folder), str(root), [listed, "inside.mp4"], LAYOUT, processes=1)
    assert [row.path for row in rows] == [str(outside), "inside.mp4"]
    assert not any(row.failure for row in rows)
    level = folder / f"short60/.outside{outside}.mp4"
    assert level_path(str(folder), 60, str(outside)) == str(level)
    assert level.exists()
    assert len(list(folder.rglob("*.mp4"))) == 2 * len(LAYOUT.sides)
    decoder = Pyramid(str(folder), str(root), PyAV())
    dataset = video_list(str(root), "list.csv", decoder=decoder)
    assert decoder.locate(dataset.path(0), 60) == str(level)
    request = ClipRequest(0, Grid(4, 32, (2, 2), (40, 40)), seed=1)
    from_original = video_list(str(root), "list.csv", decoder=PyAV())[request]
    assert (dataset[request].clip.float() - from_original.clip.float()).abs().mean() < 8
    assert encode_pyramid(str(folder), str(root), [listed, "inside.mp4"], LAYOUT, processes=1) == rows


def test_levels_of_urls_and_of_paths_with_dots_stay_in_the_folder() -> None:
    assert name_video("http://host/d/../../x.mp4", "http://host/d") == "http://host/d/../../x.mp4"
    assert name_video("http://host/d/x.mp4", "http://host/d") == "x.mp4"
    assert name_video("http://other/x.mp4", "http://host/d") == "http://other/x.mp4"
    assert name_video("/data/k/../x.mp4", "/data/k") == "/data/x.mp4"
    assert level_path("/p", 60, "http://host/d/../../../../../x.mp4") == "/p/short60/.outside/x.mp4.mp4"
    assert level_path("/p", 60, "http://other/x.mp4") == "/p/short60/.outside/http/other/x.mp4.mp4"


def test_missing_level_is_read_from_the_original(originals: Path, pyramid: Path, tmp_path: Path) -> None:
    shutil.copytree(pyramid, tmp_path, dirs_exist_ok=True)
    Path(level_path(str(tmp_path), 40, "deep/a.mp4")).unlink()
    with Pyramid(str(tmp_path), str(originals), PyAV()).open(str(originals / "deep/a.mp4"), 40) as video:
        assert min(video.height, video.width) == 80


def test_estimate_samples_all_folders(originals: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(16):
            (root / name / f"{i}.mp4").symlink_to(originals / "deep/a.mp4" if name == "a" else originals / "odd.mp4")
    names = [f"{name}/{i}.mp4" for name in ("a", "b") for i in range(16)]
    estimates: list[int] = []
    rows = encode_pyramid(
        str(tmp_path / "pyramid"), str(root), [*names, names[0]], LAYOUT, processes=1, estimate=estimates.append
    )
    assert [row.path for row in rows] == names, "once each"
    assert estimates == [pytest.approx(sum(row.level_bytes for row in rows), rel=0.001)]


def test_killed_build_continues(originals: Path, pyramid: Path, tmp_path: Path) -> None:
    shutil.copytree(pyramid, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    finished_level = Path(level_path(str(tmp_path), 40, json.loads(lines[0])["path"]))
    before = finished_level.stat().st_mtime_ns
    calls: list[tuple[int, int]] = []
    rows = encode_pyramid(
        str(tmp_path), str(originals), PATHS, LAYOUT, 1, lambda done, total: calls.append((done, total))
    )
    assert calls == [(1, 2), (2, 2)]
    assert finished_level.stat().st_mtime_ns == before
    assert [(row.path, row.frames, row.failure) for row in rows] == [(path, 40, "") for path in PATHS]
    with pytest.raises(UserError, match=r"holds a pyramid of levels \(40, 60, 80\), not \(30,\)"):
        encode_pyramid(str(tmp_path), str(originals), PATHS, PyramidLayout((30,), 100))


def test_video_that_cannot_be_encoded_is_reported_and_read_from_the_original(originals: Path, tmp_path: Path) -> None:
    whole = (originals / "deep/a.mp4").read_bytes()
    root = tmp_path / "root"
    root.mkdir()
    (root / "cut.mp4").write_bytes(whole[:400])
    (root / "whole.mp4").write_bytes(whole)
    estimates: list[int] = []
    folder = tmp_path / "pyramid"
    rows = encode_pyramid(
        str(folder), str(root), ["cut.mp4", "gone.mp4", "whole.mp4"], LAYOUT, 2, estimate=estimates.append
    )
    assert [bool(row.failure) for row in rows] == [True, True, False]
    assert "No such file" in rows[1].failure
    written_bytes = sum(Path(level_path(str(folder), side, "whole.mp4")).stat().st_size for side in LAYOUT.sides)
    assert rows[2].level_bytes == written_bytes
    assert estimates[0] == pytest.approx(written_bytes * (len(whole) + 400) / len(whole), rel=0.01)
    assert {path.name for path in folder.rglob("*.mp4")} == {"whole.mp4.mp4"}
    with Pyramid(str(folder), str(root), PyAV()).open(str(root / "whole.mp4"), 40) as video:
        assert min(video.height, video.width) == 40


def test_any_library_error_is_a_failure_row(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(source: str, targets: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'thread_count'")

    monkeypatch.setattr(pyramid_module, "_encode", encode)
    rows = encode_pyramid(str(tmp_path), str(originals), PATHS, LAYOUT, processes=1)
    assert {row.failure for row in rows} == {"'NoneType' object has no attribute 'thread_count'"}


def test_folder_without_a_pyramid_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pyramid in .*; build it with tools/prepare_data\.py"):
        Pyramid(str(tmp_path), str(tmp_path), PyAV())


def test_unwritable_folder_raises_user_error(originals: Path, tmp_path: Path) -> None:
    encode_pyramid(str(tmp_path), str(originals), PATHS[:1], LAYOUT, processes=1)
    shutil.rmtree(tmp_path / "short60")
    (tmp_path / "short60").touch()
    with pytest.raises(UserError, match=rf"^cannot write into {tmp_path}: .*; repeat the command to continue"):
        encode_pyramid(str(tmp_path), str(originals), PATHS[1:2], LAYOUT, processes=1)
