"""Videos kept as folders of images, one a frame."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .scan import is_leftover
from .videofile import Box, DecodeError, Video, errors_over

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".jpe", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class FrameFolders:
    """A decoder of folders of images in the order of their names, `fps` a second."""

    def __init__(self, fps: float) -> None:
        self.fps = fps

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`; nothing is shrunk."""
        with errors_over(path):
            return _FrameFolder(path, self.fps)


class _FrameFolder(Video):
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
        for place, index in enumerate(indices):
            with Image.open(os.path.join(self.path, self.files[index])) as image:
                out[place] = box.of(np.asarray(image.convert("RGB")))
        return torch.from_numpy(out)
