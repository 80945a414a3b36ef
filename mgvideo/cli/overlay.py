"""Copy videos with text and class-activation heat maps drawn into every frame."""

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

from mgvideo.datasets.pyav import PyAV
from mgvideo.errors import UserError
from mgvideo.storage.files import replace_when_complete
from mgvideo.storage.paths import explain_write_errors

Frame = NDArray[np.uint8]  # RGB [h, w, 3]
FrameFunction = Callable[[Frame, int], Frame]  # (frame, frame number) → the frame to write instead

MIN_FONT_PX = 9
LINE_SPACING = 1.25  # distance between lines of text, as a multiple of the font size
HEAT_COLOURS = (255 * matplotlib.colormaps["turbo"](np.arange(256))[:, :3]).astype(np.uint8)
HEAT_OPACITY = 0.6  # opacity of the colour where the heat is 1
ENCODER_OPTIONS = {"crf": "18", "preset": "veryfast"}


def rewrite_video(source: str, target: Path, paint: FrameFunction) -> None:
    """Copy a video as H.264 and replace each frame by `paint(frame, number)`.

    Frame size and timestamps stay the same. Audio is dropped. The output is written to a temporary file and renamed to
    `target` when complete.

    Raises:
        DecodeError: the source cannot be read, or its timestamps cannot be written.
        OSError: the target cannot be written.
        av.FFmpegError: the frames cannot be encoded.
    """
    with replace_when_complete(target) as part, PyAV().open(source) as video, av.open(str(part), "w") as output:
        encoder: Any = None
        for number, (time, frame) in enumerate(zip(video.rising_ticks(), video.decode_all(), strict=True)):
            upright = video.orientation.apply(frame.to_ndarray(format="rgb24"))
            painted = paint(np.ascontiguousarray(upright), number)
            encoder = encoder or _add_encoder(output, video.stream, painted)
            new = av.VideoFrame.from_ndarray(painted, format="rgb24")
            new.pts, new.time_base = time, video.stream.time_base
            output.mux(encoder.encode(new))
        output.mux(encoder.encode())


def _add_encoder(output: Any, stream: Any, frame: Frame) -> Any:
    encoder = output.add_stream("libx264", rate=stream.average_rate or 25, options=ENCODER_OPTIONS)
    encoder.height, encoder.width = frame.shape[:2]
    # yuv420p subsamples colours by 2 and so requires even sides
    encoder.pix_fmt = "yuv444p" if encoder.height % 2 or encoder.width % 2 else "yuv420p"
    # Frames are converted with ITU-R 601 (6). Without this tag, players assume 709 for large videos.
    encoder.codec_context.colorspace = 6
    encoder.codec_context.time_base = stream.time_base
    return encoder


def render_label(lines: Sequence[str], height: int, width: int) -> Frame:
    """Render lines of text on a dark band for the upper left corner of frames of this size.

    The font is as large as possible so that all lines fit into the width and a third of the height. At `MIN_FONT_PX`,
    lines that do not fit are dropped.

    Returns:
        RGBA `[h, w, 4]`, no larger than the frame.
    """
    file = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")
    size = max(MIN_FONT_PX, min(height // 14, width // 14, int(height / 3 / LINE_SPACING / len(lines))))
    while size > MIN_FONT_PX and max(ImageFont.truetype(file, size).getlength(line) for line in lines) > width - size:
        size -= 1
    font, spacing = ImageFont.truetype(file, size), round(LINE_SPACING * size)
    fitting = lines[: max(1, (height // 3) // spacing)]
    length = max(font.getlength(line) for line in fitting)
    patch = Image.new("RGBA", (min(width, round(length) + size), min(height, spacing * len(fitting))), (0, 0, 0, 140))
    draw = ImageDraw.Draw(patch)
    for row, line in enumerate(fitting):
        draw.text((size // 2, row * spacing), line, (255, 255, 255, 255), font)
    return np.asarray(patch)


def paste_label(frame: Frame, patch: Frame) -> Frame:
    """Blend an RGBA patch over the upper left corner of a frame. Returns a copy."""
    h, w = patch.shape[:2]
    alpha = patch[..., 3:] / 255
    painted = frame.copy()
    painted[:h, :w] = frame[:h, :w] * (1 - alpha) + patch[..., :3] * alpha
    return painted


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps of a video of `frames` frames: `maps` is float `[windows, t, h, w]` in 0–1, on the CPU.

    Window k covers `span` frames from `starts[k]`. Windows may overlap: the video is cut into as many equal parts as
    there are windows, and frames of part k use the maps of window k.
    """

    maps: Tensor
    starts: Sequence[int]
    span: float
    frames: int

    def map_at(self, number: int) -> Tensor:
        """Return the map of a frame, `[h, w]`, interpolated linearly between the two nearest time steps."""
        windows, steps = self.maps.shape[:2]
        window = min(number * windows // self.frames, windows - 1)
        position = (number - self.starts[window] + 0.5) / self.span * steps - 0.5
        position = min(max(position, 0.0), steps - 1.0)
        before = int(position)
        after = min(before + 1, steps - 1)
        return torch.lerp(self.maps[window, before], self.maps[window, after], position - before)


def blend_heat(frame: Frame, heat: Tensor) -> Frame:
    """Blend a heat map `[h, w]` of any size over a frame. The opacity of the colour grows with the heat."""
    size = frame.shape[:2]
    smooth = interpolate(heat[None, None], size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1).numpy()
    alpha = HEAT_OPACITY * smooth[..., None]
    return (frame * (1 - alpha) + HEAT_COLOURS[(255 * smooth).astype(np.uint8)] * alpha).astype(np.uint8)


def annotate_video(source: str, target: Path, lines: Sequence[str], heat: HeatMaps | None = None) -> None:
    """Copy a video with lines of text and, if given, heat maps in every frame. Raises as `rewrite_video`."""
    patch: Frame | None = None

    def paint(frame: Frame, number: int) -> Frame:
        nonlocal patch
        patch = render_label(lines, *frame.shape[:2]) if patch is None else patch
        return paste_label(frame if heat is None else blend_heat(frame, heat.map_at(number)), patch)

    rewrite_video(source, target, paint)


def choose_output_paths(videos: dict[str, str], folder: Path) -> dict[str, Path]:
    """Choose an output path in `folder` for each video, and create the folders.

    Args:
        videos: path of each video → its name relative to `folder`.

    Returns:
        Path of each video → its output, `NAME.mp4`; outputs with the same name get a number.

    Raises:
        UserError: an output would overwrite one of the videos, or a folder cannot be created.
    """
    targets: dict[str, Path] = {}
    for path, name in videos.items():
        target = folder / Path(name).with_suffix(".mp4")
        number = 1
        while target in targets.values():
            number += 1
            target = (folder / name).with_name(f"{Path(name).stem}_{number}.mp4")
        overwrites = target.exists() and any(os.path.exists(video) and target.samefile(video) for video in videos)
        if overwrites:
            raise UserError(f"out={folder}: {target} is one of the videos; give another folder")
        targets[path] = target
    with explain_write_errors("out", folder):
        for parent in {target.parent for target in targets.values()}:
            parent.mkdir(parents=True, exist_ok=True)
    return targets
