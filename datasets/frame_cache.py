"""Decoded frames kept on disk: a video of a small dataset is decoded once, and afterwards only read."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from torch import Tensor

from mgvideo.errors import UserError
from mgvideo.storage.paths import require_local_path

from .videofile import Box, Decoder, Video

FORMAT = 2  # of the files; those of another one are not read
STALE = 3600  # seconds after which a file that is half written is taken to be a killed run's
HEADER = struct.Struct("3q")  # frames, height, width; then the times of the frames, then their pixels


class FrameCache:
    """A decoder that keeps all frames of the files that another decodes in `folder`, up to `gib` GiB.

    Files are known by path, size and time of change, so that one that was replaced is decoded anew. What no longer
    fits is decoded each time. The frames are the other decoder's at the file's own size, whether kept or not.
    """

    def __init__(self, folder: str, decoder: Decoder, gib: float) -> None:
        self.folder = Path(require_local_path("dataset.frame_cache", folder))
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
        if place is not None:
            with suppress(OSError):  # not there, or not all of it: decoded anew
                return _Kept(path, place)
        video = self.decoder.open(path, None)
        if place is None or self.full or not self._room(video):
            return video
        with video, suppress(OSError):  # a disk that is full is no reason to stop
            self._keep(place, video)
            return _Kept(path, place)
        return self.decoder.open(path, None)

    def _place(self, path: str) -> str | None:
        try:
            found = os.stat(path)
        except OSError:  # for the decoder to explain
            return None
        name = f"{FORMAT} {os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"
        return f"{self.folder}/{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:24]}.frames"

    def _room(self, video: Video) -> bool:
        used = 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process has just put it in its place
                used += entry.stat().st_size
        self.full = used + video.frames * video.height * video.width * 3 > self.bytes
        return not self.full

    def _keep(self, place: str, video: Video) -> None:
        frames = video.read(np.arange(video.frames)).numpy()
        with NamedTemporaryFile(dir=self.folder, delete=False) as part:
            try:
                part.write(HEADER.pack(*frames.shape[:3]))
                part.write(np.ascontiguousarray(video.times, np.float64).data)
                part.write(np.ascontiguousarray(frames).data)
                part.close()
                os.replace(part.name, place)
            except OSError:
                os.unlink(part.name)
                self.full = True
                raise


class _Kept(Video):
    """A video whose frames are on disk. Raises OSError where not all are, as a power cut leaves them."""

    def __init__(self, path: str, place: str) -> None:
        self.path = path
        # read, not mapped: a map's pages are each found anew for every clip, which takes longer than to copy them
        self.file = open(place, "rb", buffering=0)  # noqa: SIM115
        header = self.file.read(HEADER.size)
        shape = HEADER.unpack(header) if len(header) == HEADER.size else (0, 0, 0)
        self.frames, self.height, self.width = shape
        self.pixels = HEADER.size + 8 * (self.frames + 1)  # where they begin
        if not self.frames or self.pixels + 3 * math.prod(shape) != os.fstat(self.file.fileno()).st_size:
            self.file.close()
            raise OSError(f"{place} is not what was written")
        self.times = np.frombuffer(self.file.read(self.pixels - HEADER.size), np.float64)

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        rows = np.empty((len(indices), box.height, self.width, 3), np.uint8)
        for part, index in zip(rows, indices.tolist(), strict=True):
            start = self.pixels + 3 * self.width * (index * self.height + box.top)
            if os.preadv(self.file.fileno(), [part.data], start) < part.nbytes:
                raise OSError(f"{self.file.name} was cut short")
        return torch.from_numpy(rows[:, :, box.left : box.left + box.width])

    def close(self) -> None:
        self.file.close()
