"""Test decoders: all return the same exact frames, and errors give the reason."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import FILES, create_bad_files, read_number, write_odd_files, write_rotated, write_video

from mgvideo.datasets.decoders import Box, DecodeError, Decoder, Decord, PyAV, TorchCodec
from mgvideo.errors import UserError


def available() -> Iterator[Decoder]:
    for kind in (Decord, PyAV, TorchCodec):
        with suppress(UserError):  # no FFmpeg on this machine, or no build for it
            yield kind()


DECODERS = list(available())
NAMES = [type(decoder).__name__ for decoder in DECODERS]
each_decoder = pytest.mark.parametrize("decoder", DECODERS, ids=NAMES)


def test_torchcodec_without_ffmpeg_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("torchcodec")
    for library in ("avutil", "avcodec", "avformat", "avdevice", "avfilter", "swscale", "swresample"):
        for version in range(4, 70):  # files that hide the libraries of all versions of FFmpeg and cannot be loaded
            (tmp_path / f"lib{library}.so.{version}").touch()
    code = "from mgvideo.datasets.decoders import TorchCodec; TorchCodec()"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "UserError: decoder: torchcodec is installed but cannot load FFmpeg" in result.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return {name: str(path) for name, path in write_odd_files(folder).items()}


@each_decoder
@pytest.mark.parametrize("name", FILES)
def test_every_index_returns_its_frame(files: dict[str, str], name: str, decoder: Decoder) -> None:
    count = FILES[name].get("frames", 40)
    shuffled = random.Random(0).choices(range(count), k=12)
    for indices in (list(range(count)), [count - 1], shuffled, [count // 2] * 3, list(range(count // 3, count, 5))):
        with decoder.open(files[name]) as video:
            assert video.frames == count
            frames = video.read(indices)
            again = video.read(indices[:3], Box(4, 6, 40, 50))
        assert torch.equal(again, frames[:3, 4:44, 6:56])
        assert frames.shape == (len(indices), video.height, video.width, 3)
        assert frames.dtype == torch.uint8
        assert [read_number(frame) for frame in frames] == indices


@pytest.mark.parametrize("short_side", [None, 60])
@pytest.mark.parametrize("name", ["plain", "odd size", "10 bit", "vp9.webm", "mpeg-4", "large"])
def test_decoders_agree_on_the_pixels(files: dict[str, str], name: str, short_side: int | None) -> None:
    pictures = []
    for decoder in DECODERS:
        with decoder.open(files[name], short_side) as video:
            pictures.append(video.read([3, 17, 30]).numpy().astype(float))
    for other, decoder_name in zip(pictures[1:], NAMES[1:], strict=True):
        assert psnr(pictures[0], other) > 40, decoder_name


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(float(np.mean((a - b) ** 2)), 1e-9))


@each_decoder
def test_rotated_video_is_upright(tmp_path: Path, decoder: Decoder) -> None:
    upright = str(write_video(tmp_path / "upright.mp4", frames=5))
    turned = str(write_rotated(tmp_path / "turned.mp4", frames=5))
    with decoder.open(upright, 12) as video:
        expected = torch.rot90(video.read([3]), 1, (1, 2))
    with decoder.open(turned, 12) as video:
        assert (video.height, video.width) == (16, 12)
        assert psnr(video.read([3]).numpy().astype(float), expected.numpy().astype(float)) > 35


REASONS = {
    "empty": "empty file",
    "text": "Invalid data",
    "truncated": "Invalid data",
    "no moov": "Invalid data",
    "audio only": "no video stream",
    "loop": "symbolic links",
    "missing": "No such file",
    "directory": "not a file",
    "pipe": "not a file",
}


@each_decoder
def test_non_video_error_gives_the_reason(tmp_path: Path, decoder: Decoder) -> None:
    for name, path in create_bad_files(tmp_path).items():
        with pytest.raises(DecodeError, match=REASONS[name]) as caught:
            decoder.open(str(path), 32)
        assert caught.value.path == str(path)
        assert "\n" not in str(caught.value)


@each_decoder
def test_forbidden_file_error_gives_the_reason(tmp_path: Path, decoder: Decoder) -> None:
    path = write_video(tmp_path / "secret.mp4", frames=2)
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root can read every file, the user nobody cannot
        with pytest.raises(DecodeError, match="Permission denied"):
            decoder.open(str(path))
    finally:
        os.seteuid(user)


def test_flipped_bytes_raise_only_decode_error(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", frames=12, options={"g": "6"}).read_bytes()
    rng, damaged, reasons = np.random.default_rng(0), tmp_path / "damaged.mp4", []
    for _ in range(200):
        content = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(len(content), size=8)
        content[places] = rng.integers(256, size=8)
        damaged.write_bytes(content.tobytes())
        try:
            with PyAV().open(str(damaged)) as video:
                video.read(range(video.frames))
        except DecodeError as error:
            reasons.append(error.reason)
    assert len(reasons) > 50
    assert all(reasons)


def test_error_of_a_non_utf8_name_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    Path(name).write_bytes(b"")
    with pytest.raises(DecodeError) as caught:
        PyAV().open(name)
    assert f"{caught.value}".encode() == f"{tmp_path}/caf\\xe9.mp4: empty file".encode()


@each_decoder
def test_truncated_video_returns_its_frames_and_fails_beyond(tmp_path: Path, decoder: Decoder) -> None:
    whole = write_video(tmp_path / "whole.mp4", options={"g": "10", "movflags": "faststart"})
    data = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(DecodeError), decoder.open(str(cut), 32) as video:
        video.read([0, 39])


@each_decoder
def test_file_descriptors_do_not_leak(tmp_path: Path, decoder: Decoder) -> None:
    good, bad = write_video(tmp_path / "a.mp4", frames=10), create_bad_files(tmp_path)
    gc.collect()
    gc.disable()  # descriptors must be closed without garbage collection
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            with decoder.open(str(good), 24) as video:
                video.read([1, 5])
            for path in bad.values():
                with pytest.raises(DecodeError):
                    decoder.open(str(path))
        assert len(os.listdir("/proc/self/fd")) <= before + 3, "a library may keep a few of its own"
    finally:
        gc.enable()


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", *"abc", "mapped", *"de", "used", *"fg")]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc before 2.33 counts in 32 bits")
def test_reading_does_not_leak_memory(tmp_path: Path) -> None:
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    path = str(write_video(tmp_path / "a.mp4", frames=40))

    def used_after(readings: int) -> int:
        for _ in range(readings):
            with PyAV().open(path, 24) as video:
                video.read([20, 5, 12])
        gc.collect()
        info = mallinfo()
        return info.used + info.mapped

    before = used_after(100)
    assert (used_after(500) - before) / 500 < 100, "bytes a reading: a demultiplexing that is left open keeps 160"
