"""A disk cache of decoded frames, for small datasets: each video is decoded only once."""

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

from mgvideo.storage.members import file_on_disk
from mgvideo.storage.paths import explain_write_errors, require_local_path

from .videofile import Box, Decoder, Video

FORMAT = 2  # version of the cache files; other versions are ignored
STALE_S = 3600  # age at which an unfinished file is deleted as left by a killed run
HEADER = struct.Struct("3q")  # frames, height, width; the times of the frames and their pixels follow


class FrameCache:
    """A decoder that caches all frames that another decoder returns, in `folder`, up to `gib` GiB.

    The cache key is the path, size and modification time, so a replaced file is decoded again. Videos that do not fit
    are decoded each time. Cached or not, frames have the size of the file; `short_side` is ignored.
    """

    def __init__(self, folder: str, decoder: Decoder, gib: float) -> None:
        self.folder = Path(require_local_path("dataset.frame_cache", folder))
        self.decoder, self.bytes = decoder, int(gib * 2**30)
        self.full = False
        with explain_write_errors("dataset.frame_cache", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob("tmp*"):
            with suppress(OSError):  # another process may have deleted it
                if time.time() - part.stat().st_mtime > STALE_S:
                    part.unlink()

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`."""
        cache_file = self._cache_file(path)
        if cache_file is not None:
            with suppress(OSError):  # missing or incomplete: decode again
                return _CachedVideo(path, cache_file)
        video = self.decoder.open(path, None)
        if cache_file is None or self.full or not self._has_room(video):
            return video
        with video, suppress(OSError):  # continue without the cache if the disk is full
            self._write(cache_file, video)
            return _CachedVideo(path, cache_file)
        return self.decoder.open(path, None)

    def _cache_file(self, path: str) -> str | None:
        """Return the cache file of a video, or None if the video does not exist."""
        try:
            stat = os.stat(file_on_disk(path))
        except OSError:  # the decoder raises the error
            return None
        name = f"{FORMAT} {os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
        return f"{self.folder}/{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:24]}.frames"

    def _has_room(self, video: Video) -> bool:
        """Return whether the frames of a video still fit; sets `full` if not."""
        used = 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # another process has just renamed it
                used += entry.stat().st_size
        self.full = used + video.frames * video.height * video.width * 3 > self.bytes
        return not self.full

    def _write(self, cache_file: str, video: Video) -> None:
        """Write all frames under a temporary name, then rename the file; raises OSError."""
        frames = video.read(np.arange(video.frames)).numpy()
        with NamedTemporaryFile(dir=self.folder, delete=False) as part:
            try:
                part.write(HEADER.pack(*frames.shape[:3]))
                part.write(np.ascontiguousarray(video.times, np.float64).data)
                part.write(np.ascontiguousarray(frames).data)
                part.close()
                os.replace(part.name, cache_file)
            except OSError:
                os.unlink(part.name)
                self.full = True
                raise


class _CachedVideo(Video):
    """A video with its frames in a cache file. Raises OSError if the file is incomplete, as after a power cut."""

    def __init__(self, path: str, cache_file: str) -> None:
        self.path = path
        # Read, not mmap: page faults of a new mapping for each clip cost more than copying.
        self.file = open(cache_file, "rb", buffering=0)  # noqa: SIM115
        header = self.file.read(HEADER.size)
        shape = HEADER.unpack(header) if len(header) == HEADER.size else (0, 0, 0)
        self.frames, self.height, self.width = shape
        self.pixels = HEADER.size + 8 * (self.frames + 1)  # offset in bytes
        if not self.frames or self.pixels + 3 * math.prod(shape) != os.fstat(self.file.fileno()).st_size:
            self.file.close()
            raise OSError(f"{cache_file} is incomplete")
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
