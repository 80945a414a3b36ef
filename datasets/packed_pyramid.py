"""A pyramid inside tar archives: the levels of a video are files of its sample, beside the original."""

from __future__ import annotations

import json
import os

import numpy as np

from mgvideo.errors import UserError
from mgvideo.storage.members import Member, parse_member
from mgvideo.storage.paths import exists, join

from .array_file import Strings
from .decoders import Decoder
from .pyramid import Pyramid, PyramidLayout
from .shard_index import read_index
from .tables import read_json_object


class PackedPyramid(Pyramid):
    """A decoder that opens a level of a sample of the archives in `folder` instead of the sample's video."""

    def __init__(self, folder: str, decoder: Decoder) -> None:
        self.folder, self.decoder = folder, decoder
        self._arrays = read_index(folder)
        layout = read_json_object(join(folder, "layout.json"))
        self.layout = PyramidLayout(tuple(layout["sides"]), layout["largest"])
        if not set(self.layout.sides) <= set(self._arrays.header["sides"]):
            raise UserError(f"dataset.pyramid: the archives in {folder} lack levels of layout.json")
        self._shards = {name: number for number, name in enumerate(self._arrays.header["shards"])}

    def _find(self, path: str, short_side: int | None) -> tuple[str, float] | None:
        member = parse_member(path)
        shard = self._shards.get(os.path.basename(member.archive)) if member else None
        if member is None or shard is None:
            return None
        arrays = self._arrays
        first, stop = np.searchsorted(arrays["shards"], (shard, shard + 1))
        row = first + int(np.searchsorted(arrays["offsets"][first:stop], member.offset))
        if row == stop or arrays["offsets"][row] != member.offset:
            return None
        fields = json.loads(Strings(arrays["labels"], arrays["label_bounds"])[row])
        side = self._side(fields["short_side"], short_side) if "short_side" in fields else None
        if side is None:
            return None
        column = arrays.header["sides"].index(side)
        offset, size = int(arrays["level_offsets"][row, column]), int(arrays["level_sizes"][row, column])
        name = f"{member.name.partition('.')[0]}.short{side}.mp4"
        level = Member(join(self.folder, os.path.basename(member.archive)), offset, size, name)
        return None if offset < 0 else (level.path, float(fields.get("first_frame", 0)))


def open_pyramid(folder: str, root: str, decoder: Decoder) -> Pyramid:
    """Return the pyramid in a folder or at a URL, in files or in archives. Raises UserError."""
    try:
        packed = exists(join(folder, "layout.json")) and not exists(join(folder, "rows.jsonl"))
    except OSError as error:
        raise UserError(f"dataset.pyramid: {folder} cannot be read: {error.strerror}") from None
    return PackedPyramid(folder, decoder) if packed else Pyramid(folder, root, decoder)
