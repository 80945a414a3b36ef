"""Rotation and mirroring of stored pictures for display, from the display matrix of a video file."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

EXACT_TOLERANCE = 0.02  # largest ratio of the smaller to the larger matrix entries of an exact quarter turn


class Orientation(NamedTuple):
    """One of the eight symmetries of a square: transpose, then reverse the rows, then the columns.

    `exact`: whether the display matrix is this symmetry, and not a rotation by another angle.
    """

    transpose: bool = False
    reverse_rows: bool = False
    reverse_columns: bool = False
    exact: bool = True

    @property
    def upright(self) -> bool:
        """Whether pictures are displayed as they are stored."""
        return not any(self[:3])

    @property
    def mirrored(self) -> bool:
        """Whether pictures are mirrored, in addition to the rotation."""
        return sum(self[:3]) % 2 == 1

    @property
    def degrees(self) -> int:
        """Counter-clockwise rotation in degrees, applied before mirroring left to right."""
        columns = self.reverse_columns != self.mirrored
        return {(0, 0): 0, (1, 0): 90, (0, 1): 180, (1, 1): 270}[self.transpose, columns]

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Return a view of a picture `[h, w, …]` as it is displayed: `[w, h, …]` if it is transposed."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.reverse_rows else 1, :: -1 if self.reverse_columns else 1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the displayed height and width of a stored picture, or the stored size of a displayed one."""
        return (width, height) if self.transpose else (height, width)


def read_orientation(frame: Any) -> Orientation:
    """Return the orientation of a frame decoded by PyAV; other angles are rounded to the nearest quarter turn."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return Orientation() if matrix is None else orientation_from_matrix(bytes(matrix))


def orientation_from_matrix(matrix: bytes) -> Orientation:
    """Convert a display matrix to an orientation.

    The matrix is nine int32 `a b u c d v x y w`, which display pixel (x, y) at (a·x + c·y, b·x + d·y).
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    diagonal, off_diagonal = abs(a) + abs(d), abs(b) + abs(c)
    exact = min(diagonal, off_diagonal) <= EXACT_TOLERANCE * max(diagonal, off_diagonal)
    if off_diagonal > diagonal:
        return Orientation(True, b < 0, c < 0, exact)
    return Orientation(False, d < 0, a < 0, exact)
