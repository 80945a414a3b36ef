"""Decoded frames kept on disk: a video of a small dataset is decoded once, and afterwards only mapped into memory."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from torch import Tensor

from mgvideo.errors import UserError
from mgvideo.paths import to_write

from .videofile import Box, Decoder, Video

STALE = 3600  # seconds after which a file that is half written is taken to be a killed run's
HEADER = 4  # float64 numbers before the pixels: frames, height, width, frames a second


class FrameCache:
    """A decoder that keeps all frames of the files that another decodes in `folder`, up to `gib` GiB.

    Files are known by path, size and time of change, so that one that was replaced is decoded anew. What no longer
    fits is decoded each time. The frames are the other decoder's at the file's own size, whether kept or not.
    """

    def __init__(self, folder: str, decoder: Decoder, gib: float) -> None:
        self.folder = Path(to_write("dataset.frame_cache", folder))
        self.decoder, self.bytes = decoder, int(gib * 2**30)
        self.full = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make dataset.frame_cache={folder}: {error.strerror}") from error
        for part in self.folder.glob("tmp*"):
            with suppress(OSError):  # another process may clear it as well
                if time.time() - part.stat().st_mtime > STALE:
                    part.unlink()

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`."""
        place = self._place(path)
        if place is not None and place.exists():
            with suppress(OSError):  # not all there: decoded anew
                return _Kept(path, place)
        video = self.decoder.open(path, None)
        if place is None or self.full or not self._room(video):
            return video
        with video, suppress(OSError):  # a disk that is full is no reason to stop
            self._keep(place, video)
            return _Kept(path, place)
        return self.decoder.open(path, None)

    def _place(self, path: str) -> Path | None:
        try:
            found = os.stat(path)
        except OSError:  # for the decoder to explain
            return None
        name = f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"
        return self.folder / f"{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:24]}.frames"

    def _room(self, video: Video) -> bool:
        used = 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process has just put it in its place
                used += entry.stat().st_size
        self.full = used + video.frames * video.height * video.width * 3 > self.bytes
        return not self.full

    def _keep(self, place: Path, video: Video) -> None:
        frames = video.read(np.arange(video.frames)).numpy()
        with NamedTemporaryFile(dir=self.folder, delete=False) as part:
            try:
                part.write(np.array([*frames.shape[:3], video.fps], np.float64).tobytes())
                part.write(np.ascontiguousarray(frames).data)
                part.close()
                os.replace(part.name, place)
            except OSError:
                os.unlink(part.name)
                self.full = True
                raise


class _Kept(Video):
    """A video whose frames are on disk. Raises OSError where not all are, as a power cut leaves them."""

    def __init__(self, path: str, place: Path) -> None:
        self.path, self.place = path, place
        header = np.fromfile(place, np.float64, HEADER)
        if len(header) < HEADER or 8 * HEADER + 3 * header[:3].prod() != place.stat().st_size:
            raise OSError(f"{place} is not what was written")
        *shape, self.fps = header.tolist()
        self.frames, self.height, self.width = map(int, shape)

    def _read(self, indices: Sequence[int] | np.ndarray, box: Box) -> Tensor:
        shape = (self.frames, self.height, self.width, 3)
        pixels = np.memmap(self.place, np.uint8, "r", offset=8 * HEADER, shape=shape)
        return torch.from_numpy(np.asarray(box.of(pixels)[indices]))
