"""Videos written again with something drawn into every frame: lines of text, and heat maps."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from mgvideo.errors import UserError

from .pyav import PyAV

Picture = NDArray[np.uint8]  # RGB [h, w, 3]
Paint = Callable[[Picture, int], Picture]  # a frame and its number to what takes its place

SMALLEST = 9  # pixels of the smallest letters
LINE = 1.25  # from one line of letters to the next, in their size
COLOURS = (255 * matplotlib.colormaps["turbo"](np.arange(256))[:, :3]).astype(np.uint8)
STRENGTH = 0.6  # of the hottest place's colour
CODEC = {"crf": "18", "preset": "veryfast"}


def rewrite(source: str, target: Path, paint: Paint) -> None:
    """Write a video as H.264 with every frame painted over; size and times stay, the sound is left out.

    The file appears under its name when it is whole.

    Raises:
        DecodeError: the source cannot be read, or its times cannot be written.
        OSError: the target cannot be written.
        av.FFmpegError: the frames cannot be encoded.
    """
    part = target.with_name(f".{target.name}.part.mp4")
    try:
        with PyAV().open(source) as video, av.open(str(part), "w") as output:
            encoder: Any = None
            for number, (time, frame) in enumerate(zip(video.rising_ticks(), video.decode_all(), strict=True)):
                upright = video.orientation.apply(frame.to_ndarray(format="rgb24"))
                painted = paint(np.ascontiguousarray(upright), number)
                encoder = encoder or _encoder(output, video.stream, painted)
                new = av.VideoFrame.from_ndarray(painted, format="rgb24")
                new.pts, new.time_base = time, video.stream.time_base
                output.mux(encoder.encode(new))
            output.mux(encoder.encode())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _encoder(output: Any, stream: Any, picture: Picture) -> Any:
    encoder = output.add_stream("libx264", rate=stream.average_rate or 25, options=CODEC)
    encoder.height, encoder.width = picture.shape[:2]
    # the usual colours come in blocks of 2 × 2
    encoder.pix_fmt = "yuv444p" if encoder.height % 2 or encoder.width % 2 else "yuv420p"
    encoder.codec_context.colorspace = (
        6  # ITU-R 601, which pictures are converted to: else players take large ones for 709
    )
    encoder.codec_context.time_base = stream.time_base
    return encoder


def label_patch(lines: Sequence[str], height: int, width: int) -> Picture:
    """Lines of text on a dark band, RGBA `[h, w, 4]`, for the upper left corner of frames of this size.

    Letters are as large as all lines allow in the width and a third of the height, down to the smallest: of those, as
    many lines are there as fit.
    """
    file = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    size = max(SMALLEST, min(height // 14, width // 14, int(height / 3 / LINE / len(lines))))
    while size > SMALLEST and max(ImageFont.truetype(file, size).getlength(line) for line in lines) > width - size:
        size -= 1
    font, spacing = ImageFont.truetype(file, size), round(LINE * size)
    shown = lines[: max(1, (height // 3) // spacing)]
    length = max(font.getlength(line) for line in shown)
    patch = Image.new("RGBA", (min(width, round(length) + size), min(height, spacing * len(shown))), (0, 0, 0, 140))
    draw = ImageDraw.Draw(patch)
    for place, line in enumerate(shown):
        draw.text((size // 2, place * spacing), line, (255, 255, 255, 255), font)
    return np.asarray(patch)


def paste(picture: Picture, patch: Picture) -> Picture:
    """A frame with an RGBA patch over its upper left corner."""
    h, w = patch.shape[:2]
    alpha = patch[..., 3:] / 255
    painted = picture.copy()
    painted[:h, :w] = picture[:h, :w] * (1 - alpha) + patch[..., :3] * alpha
    return painted


@dataclass(frozen=True)
class Heat:
    """Heat over a video of `frames` frames: `maps` float `[windows, t, h, w]` in 0–1, on the CPU.

    Window k covers `span` frames from `starts[k]`; the windows share the video's frames evenly among them.
    """

    maps: Tensor
    starts: Sequence[int]
    span: float
    frames: int

    def at(self, number: int) -> Tensor:
        """The map of a frame, `[h, w]`: in time, a linear mixture of its neighbours."""
        windows, steps = self.maps.shape[:2]
        window = min(number * windows // self.frames, windows - 1)
        place = (number - self.starts[window] + 0.5) / self.span * steps - 0.5
        place = min(max(place, 0.0), steps - 1.0)
        before = int(place)
        after = min(before + 1, steps - 1)
        return torch.lerp(self.maps[window, before], self.maps[window, after], place - before)


def blend(picture: Picture, heat: Tensor) -> Picture:
    """A frame under a heat map `[h, w]` of any size: the hotter, the more of the map's colour."""
    size = picture.shape[:2]
    smooth = interpolate(heat[None, None], size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
    alpha = STRENGTH * smooth[..., None]
    return (picture * (1 - alpha) + COLOURS[(255 * smooth).astype(np.uint8)] * alpha).astype(np.uint8)


def annotate(source: str, target: Path, lines: Sequence[str], heat: Heat | None = None) -> None:
    """Write a video with lines of text, and the heat, in every frame; see `rewrite`."""
    patch: Picture | None = None

    def paint(picture: Picture, number: int) -> Picture:
        nonlocal patch
        patch = label_patch(lines, *picture.shape[:2]) if patch is None else patch
        return paste(picture if heat is None else blend(picture, heat.at(number)), patch)

    rewrite(source, target, paint)


def choose_targets(videos: dict[str, str], folder: Path) -> dict[str, Path]:
    """Where each video is written to, none over another nor over an original. Raises UserError."""
    targets: dict[str, Path] = {}
    for path, name in videos.items():
        target = folder / Path(name).with_suffix(".mp4")
        number = 1
        while target in targets.values():
            number += 1
            target = (folder / name).with_name(f"{Path(name).stem}_{number}.mp4")
        clash = target.exists() and any(os.path.exists(video) and target.samefile(video) for video in videos)
        if clash:
            raise UserError(f"out={folder}: {target} is one of the videos; give another folder")
        targets[path] = target
    try:
        for parent in {target.parent for target in targets.values()}:
            parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write out={folder}: {error.strerror}") from error
    return targets
