"""Test display matrices: all readers return pictures as a player shows them."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from test_decoders import DECODERS, NAMES, psnr
from videos import write_video

from mgvideo.cli.overlay import annotate_video
from mgvideo.datasets.check import check
from mgvideo.datasets.decoders import Decoder, PyAV
from mgvideo.datasets.orientation import orientation_from_matrix
from mgvideo.datasets.pyramid import Pyramid, PyramidLayout, encode_pyramid

# entries a b c d of matrices that display pixel (x, y) at (a x + c y, b x + d y)
SYMMETRIES = {
    "as stored": (1, 0, 0, 1),
    "half turn": (-1, 0, 0, -1),
    "quarter turn": (0, 1, -1, 0),
    "quarter turn back": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transposed, half turn": (0, -1, -1, 0),
}
each_symmetry = pytest.mark.parametrize("matrix", SYMMETRIES.values(), ids=SYMMETRIES)


def write_shown(path: Path, matrix: tuple[float, float, float, float], **options: int) -> Path:
    """Write a video with a display matrix."""
    content = bytearray(write_video(path, **options).read_bytes())
    a, b, c, d = (round(65536 * value) for value in matrix)
    place = content.index(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def as_shown(frames: torch.Tensor, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Move each pixel of stored frames `[t, h, w, 3]` to its displayed position."""
    a, b, c, d = matrix
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    columns, rows = a * x + c * y, b * x + d * y
    columns, rows = columns - columns.min(), rows - rows.min()
    out = np.zeros((len(frames), rows.max() + 1, columns.max() + 1, 3), np.uint8)
    out[:, rows, columns] = frames.numpy()
    return out


def frames_of(path: str, decoder: Decoder | None = None, short_side: int | None = None) -> torch.Tensor:
    with (decoder or PyAV()).open(path, short_side) as video:
        return video.read(range(video.frames))


@each_symmetry
@pytest.mark.parametrize("decoder", DECODERS, ids=NAMES)
def test_clips_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int], decoder: Decoder) -> None:
    stored = frames_of(str(write_video(tmp_path / "stored.mp4", frames=4)))
    shown = str(write_shown(tmp_path / "shown.mp4", matrix, frames=4))
    assert np.array_equal(frames_of(shown), as_shown(stored, matrix))
    assert psnr(frames_of(shown, decoder).numpy().astype(float), as_shown(stored, matrix).astype(float)) > 38
    assert frames_of(shown, decoder, 15).shape == (4, *((15, 20) if matrix[0] else (20, 15)), 3)


@each_symmetry
def test_pyramid_levels_and_overlays_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    root, folder = tmp_path / "root", str(tmp_path / "pyramid")
    path = str(write_shown(root / "shown.mp4", matrix, frames=4, height=80, width=120))
    shown = frames_of(path).numpy().astype(float)
    (row,) = encode_pyramid(folder, str(root), ["shown.mp4"], PyramidLayout((80,), 80), processes=1)
    assert not row.failure
    level = frames_of(path, Pyramid(folder, str(root), PyAV()), 80).numpy().astype(float)
    assert psnr(level, shown) > 32
    annotate_video(path, tmp_path / "drawn.mp4", ["x"])
    drawn = frames_of(str(tmp_path / "drawn.mp4")).numpy().astype(float)
    assert psnr(drawn[:, 40:], shown[:, 40:]) > 32, "below the text"


def matrix_bytes(a: float, b: float, c: float, d: float) -> bytes:
    return struct.pack("=9i", *(round(65536 * value) for value in (a, b, 0, c, d, 0, 0, 0, 16384)))


def test_degrees_and_mirrored() -> None:
    named = {name: orientation_from_matrix(matrix_bytes(*matrix)) for name, matrix in SYMMETRIES.items()}
    assert {name: (turn.degrees, turn.mirrored) for name, turn in named.items()} == {
        "as stored": (0, False),
        "half turn": (180, False),
        "quarter turn": (270, False),
        "quarter turn back": (90, False),
        "mirrored": (0, True),
        "upside down": (180, True),
        "transposed": (270, True),
        "transposed, half turn": (90, True),
    }
    assert all(turn.exact for turn in named.values())


@pytest.mark.parametrize(("degrees", "nearest"), [(10, 0), (80, 90), (100, 90), (-170, 180), (-95, 270)])
def test_other_angle_is_rounded_to_a_quarter_turn_and_reported(tmp_path: Path, degrees: int, nearest: int) -> None:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = orientation_from_matrix(matrix_bytes(cos, -sin, sin, cos))
    assert (turn.degrees, turn.mirrored, turn.exact) == (nearest, False, False)
    path = str(write_shown(tmp_path / "shown.mp4", (cos, -sin, sin, cos), frames=3))
    (finding,) = check([path], processes=1)
    assert finding.problem == "rotated"
    assert "rounded to a quarter turn" in finding.reason


def test_missing_and_empty_matrices_are_upright() -> None:
    assert orientation_from_matrix(bytes(36)).upright
    assert orientation_from_matrix(matrix_bytes(2, 0, 0, 1.5)).upright, "a scale is no turn"
