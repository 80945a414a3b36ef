"""Videos stored as folders of images, one image a frame."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .scan import is_leftover
from .videofile import Box, DecodeError, Video, raise_decode_errors

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".jpe", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class FrameFolders:
    """A decoder for folders of images, ordered by name, with `fps` frames a second."""

    def __init__(self, fps: float) -> None:
        self.fps = fps

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`; `short_side` is ignored."""
        with raise_decode_errors(path):
            return _FrameFolder(path, self.fps)


class _FrameFolder(Video):
    is_folder = True

    def __init__(self, path: str, fps: float) -> None:
        self.path = path
        names = [name for name in os.listdir(path) if not is_leftover(name)]
        self.files = sorted(name for name in names if Path(name).suffix.lower() in SUFFIXES)
        if not self.files:
            raise DecodeError(path, "no images in the folder")
        self.frames = len(self.files)
        self.times = np.arange(self.frames + 1) / fps
        with Image.open(os.path.join(path, self.files[0])) as image:
            self.width, self.height = image.size

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        out = np.empty((len(indices), box.height, box.width, 3), np.uint8)
        for position, index in enumerate(indices):
            with Image.open(os.path.join(self.path, self.files[index])) as image:
                out[position] = box.crop(np.asarray(image.convert("RGB")))
        return torch.from_numpy(out)
