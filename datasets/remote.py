"""Remote videos: their local copies stay within a limit, and are locked while they are read."""

from __future__ import annotations

import errno

from mgvideo.storage.members import file_on_disk
from mgvideo.storage.paths import is_remote, local_copy
from mgvideo.storage.remote_cache import copy_path, limit_size, lock_copy

from .videofile import Decoder, Video, raise_decode_errors

MAX_TRIES = 5  # times to fetch a copy that other processes delete at once


class RemoteVideos:
    """A decoder that keeps at most `gib` GiB of copies of remote videos; None: as much as the disk holds."""

    def __init__(self, decoder: Decoder, gib: float | None) -> None:
        self.decoder, self.bytes = decoder, None if gib is None else int(gib * 2**30)

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`."""
        if not is_remote(path):
            return self.decoder.open(path, short_side)
        with raise_decode_errors(path):
            for _ in range(MAX_TRIES):
                if not copy_path(path).exists():
                    limit_size(self.bytes)
                lock = lock_copy(file_on_disk(local_copy(path)))
                if lock is not None:
                    break
            else:
                raise OSError(errno.ENOSPC, "its local copy is deleted again and again: raise dataset.cache_gib")
            try:
                video = self.decoder.open(path, short_side)
            except BaseException:
                lock.close()
                raise
            video.lock = lock
            return video
