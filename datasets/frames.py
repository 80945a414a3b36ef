"""Videos stored as folders of images, one image a frame."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .scan import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_leftover
from .videofile import Box, DecodeError, Decoder, Video, raise_decode_errors


class FrameFolders:
    """A decoder for folders of images, ordered by name, with `fps` frames a second.

    A video is a folder of images if its path, with or without the extension, is a folder. `decoder` opens the others.
    """

    def __init__(self, fps: float, decoder: Decoder | None = None) -> None:
        self.fps, self.decoder = fps, decoder

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`; `short_side` is ignored for images."""
        folder = frame_folder(path)
        if folder is None and self.decoder is not None:
            return self.decoder.open(path, short_side)
        with raise_decode_errors(path):
            return _FrameFolder(path, folder or path, self.fps)


def frame_folder(path: str) -> str | None:
    """Return the folder that holds the frames of a video as images, or None if there is none."""
    try:
        return path if stat.S_ISDIR(os.stat(path).st_mode) else None  # one look at the disk for a video file
    except (OSError, ValueError):
        folder, suffix = os.path.splitext(path)
        return folder if suffix.lower() in VIDEO_SUFFIXES and os.path.isdir(folder) else None


class _FrameFolder(Video):
    is_folder = True

    def __init__(self, path: str, folder: str, fps: float) -> None:
        self.path, self.folder = path, folder
        names = [name for name in os.listdir(folder) if not is_leftover(name)]
        self.files = sorted(name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)
        if not self.files:
            raise DecodeError(path, "no images in the folder")
        self.frames = len(self.files)
        self.times = np.arange(self.frames + 1) / fps
        with Image.open(os.path.join(folder, self.files[0])) as image:
            self.width, self.height = image.size

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        out = np.empty((len(indices), box.height, box.width, 3), np.uint8)
        for position, index in enumerate(indices):
            with Image.open(os.path.join(self.folder, self.files[index])) as image:
                out[position] = box.crop(np.asarray(image.convert("RGB")))
        return torch.from_numpy(out)
