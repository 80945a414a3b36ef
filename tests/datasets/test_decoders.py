"""Decoders: the same exact frames from each, whatever the file, and a clear reason where there are none."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from videos import number_of, write

from mgvideo.datasets.decoders import Box, DecodeError, Decoder, Decord, PyAV, TorchCodec
from mgvideo.errors import UserError


def available() -> list[Decoder]:
    try:
        return [Decord(), PyAV(), TorchCodec()]
    except UserError:  # no FFmpeg on this machine
        return [Decord(), PyAV()]


DECODERS = available()
NAMES = [type(decoder).__name__ for decoder in DECODERS]
each_decoder = pytest.mark.parametrize("decoder", DECODERS, ids=NAMES)

FILES = {
    "plain": {"options": {"g": "12"}},
    "b-frames": {"options": {"g": "250", "bf": "3", "b_strategy": "0"}},
    "open gop": {"options": {"x264-params": "open-gop=1:keyint=10:bframes=3:b-adapt=0"}},
    "all keyframes": {"options": {"g": "1"}},
    "no b-frames": {"options": {"g": "8", "bf": "0", "tune": "fastdecode"}},
    "variable frame rate": {"times": lambda i: i + 2 * (i // 7) + (i > 20) * 13},
    "late start": {"times": lambda i: i + 37},
    "odd size": {"height": 61, "width": 83, "pix_fmt": "yuv444p"},
    "4:4:4": {"pix_fmt": "yuv444p"},
    "10 bit": {"pix_fmt": "yuv420p10le"},
    "one frame": {"frames": 1},
    "mpeg-4": {"codec": "mpeg4", "options": {"g": "10", "qscale": "2", "flags": "qscale"}},
    "avi.avi": {"codec": "mpeg4", "options": {"g": "10"}},
    "h.265": {"codec": "libx265", "options": {"g": "12", "x265-params": "log-level=none"}},
    "b-frames.avi": {"codec": "mpeg4", "options": {"g": "12", "bf": "2", "qscale": "2", "flags": "qscale"}},
    "stream.ts": {"options": {"bf": "3", "g": "250"}},
    "av1": {"codec": "libsvtav1", "options": {"preset": "12", "g": "10", "svtav1-params": "lp=1"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "mkv.mkv": {"options": {"g": "12"}},
    "large": {"height": 202, "width": 310},
    "spaces and ünïcode 視頻": {},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    names = {name: name if "." in name and name != "h.265" else f"{name}.mp4" for name in FILES}
    return {name: str(write(folder / names[name], **options)) for name, options in FILES.items()}


@each_decoder
@pytest.mark.parametrize("name", FILES)
def test_every_index_gives_its_own_frame(files: dict[str, str], name: str, decoder: Decoder) -> None:
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
        assert [number_of(frame) for frame in frames] == indices


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
def test_a_rotated_video_comes_upright(tmp_path: Path, decoder: Decoder) -> None:
    upright = str(write(tmp_path / "upright.mp4", frames=5))
    turned = str(tmp_path / "turned.mp4")
    with av.open(upright) as source, av.open(turned, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with decoder.open(upright, 12) as video:
        expected = torch.rot90(video.read([3]), 1, (1, 2))
    with decoder.open(turned, 12) as video:
        assert (video.height, video.width) == (16, 12)
        assert psnr(video.read([3]).numpy().astype(float), expected.numpy().astype(float)) > 35


def bad_files(folder: Path) -> dict[str, Path]:
    """Paths that hold no readable video."""
    whole = write(folder / "whole.mp4", options={"g": "12"}).read_bytes()
    paths = {name: folder / f"{name}.mp4" for name in ("empty", "text", "truncated", "no moov", "audio only", "loop")}
    paths["empty"].write_bytes(b"")
    paths["text"].write_text("not a video\n" * 100)
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["no moov"].write_bytes(whole[: whole.index(b"moov") - 4])
    with av.open(str(paths["audio only"]), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    paths["loop"].symlink_to(paths["loop"])
    os.mkfifo(folder / "pipe.mp4")
    return paths | {"missing": folder / "missing.mp4", "directory": folder, "pipe": folder / "pipe.mp4"}


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
def test_what_is_no_video_says_why(tmp_path: Path, decoder: Decoder) -> None:
    for name, path in bad_files(tmp_path).items():
        with pytest.raises(DecodeError, match=REASONS[name]) as caught:
            decoder.open(str(path), 32)
        assert caught.value.path == str(path)
        assert "\n" not in str(caught.value)


@each_decoder
def test_a_forbidden_file_says_so(tmp_path: Path, decoder: Decoder) -> None:
    path = write(tmp_path / "secret.mp4", frames=2)
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read anything, nobody may not
        with pytest.raises(DecodeError, match="Permission denied"):
            decoder.open(str(path))
    finally:
        os.seteuid(user)


@each_decoder
def test_a_video_cut_short_gives_what_it_has_and_an_error_beyond(tmp_path: Path, decoder: Decoder) -> None:
    whole = write(tmp_path / "whole.mp4", options={"g": "10", "movflags": "faststart"})
    data = whole.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: int(len(data) * 0.6)])
    with pytest.raises(DecodeError), decoder.open(str(cut), 32) as video:
        video.read([0, 39])


@each_decoder
def test_descriptors_stay_few(tmp_path: Path, decoder: Decoder) -> None:
    good, bad = write(tmp_path / "a.mp4", frames=10), bad_files(tmp_path)
    gc.collect()
    gc.disable()  # nothing may wait for a collection
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
