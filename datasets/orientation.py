"""How a stored picture is turned and mirrored to be shown, as the display matrix of its file says."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

TOLERANCE = 0.02  # of a turn that is not by a quarter, against the sides of the picture


class Orientation(NamedTuple):
    """One of the eight symmetries of a square: transpose, then reverse the rows, then the columns.

    `exact`: the file asks for just this, and not for another angle.
    """

    transpose: bool = False
    reverse_rows: bool = False
    reverse_columns: bool = False
    exact: bool = True

    @property
    def upright(self) -> bool:
        """Whether pictures are shown as they are stored."""
        return not any(self[:3])

    @property
    def mirrored(self) -> bool:
        """Whether pictures are shown mirrored, beside being turned."""
        return sum(self[:3]) % 2 == 1

    @property
    def degrees(self) -> int:
        """The turn, counter-clockwise: of a mirrored picture, before it is mirrored left to right."""
        columns = self.reverse_columns != self.mirrored
        return {(0, 0): 0, (1, 0): 90, (0, 1): 180, (1, 1): 270}[self.transpose, columns]

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """A picture `[h, w, …]` as it is shown: a view, `[w, h, …]` where it is transposed."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.reverse_rows else 1, :: -1 if self.reverse_columns else 1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a picture of this size as it is shown; its own inverse."""
        return (width, height) if self.transpose else (height, width)


def orientation(frame: Any) -> Orientation:
    """Of a frame decoded by PyAV; other angles than quarter turns become the nearest one."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return Orientation() if matrix is None else from_matrix(bytes(matrix))


def from_matrix(matrix: bytes) -> Orientation:
    """Of a display matrix: nine int32 `a b u c d v x y w`, which show pixel (x, y) at (a·x + c·y, b·x + d·y)."""
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    straight, crossed = abs(a) + abs(d), abs(b) + abs(c)
    exact = min(straight, crossed) <= TOLERANCE * max(straight, crossed)
    if crossed > straight:
        return Orientation(True, b < 0, c < 0, exact)
    return Orientation(False, d < 0, a < 0, exact)
