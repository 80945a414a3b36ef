"""A pyramid: every video of a dataset encoded once more at a few sizes, cheap to read a few frames from.

The levels are H.264 with a keyframe every eight frames and nothing that slows decoding down (x264's `fastdecode`, no
B-frames); each holds every frame of the original. A reader takes the smallest level that leaves its clip no blurrier
than the base grid may be when read from the original. What was tried and what it gave: docs/benchmarks/data.md.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from mgvideo.errors import UserError
from mgvideo.storage.paths import belongs_to, is_remote, join, read_bytes, relative, strip_file_scheme

from .orientation import Orientation
from .parallel import Progress, parallel, silent
from .pyav import PyAV, PyAVVideo
from .videofile import DecodeError, Decoder, Video, errors_over

KEYFRAME = 8
OPTIONS = {"preset": "veryfast", "tune": "fastdecode", "crf": "20", "g": str(KEYFRAME), "bf": "0", "threads": "1"}
COLOURS = ("colorspace", "color_range", "color_primaries", "color_trc")  # what a decoder has to know of a picture's
SAMPLE = 16  # videos to encode before saying how much space all will take


@dataclass(frozen=True)
class Layout:
    """What a pyramid is built for: short sides of its levels, and the largest short side that the base grid draws."""

    sides: tuple[int, ...]
    largest: int

    @classmethod
    def of(cls, sizes: Iterable[int], scales: tuple[int, int], original: int) -> Layout:
        """A level for each crop size of a plan, given the base's jitter and the usual short side of the originals."""
        sizes, top = sorted(set(sizes)), min(original, scales[1])
        return cls(tuple(2 * math.ceil(top * size / sizes[-1] / 2) for size in sizes), scales[1])


@dataclass(frozen=True)
class ManifestRow:
    """A video in a pyramid's manifest: its short side, frames and bytes, those of its levels, why it has none.

    `start`: seconds at which its first frame appears.
    """

    path: str
    short_side: int = 0
    frames: int = 0
    start: float = 0.0
    bytes: int = 0
    level_bytes: int = 0
    failure: str = ""


class Pyramid:
    """A decoder that opens a level of the pyramid in `folder` in place of the original under `root`."""

    def __init__(self, folder: str, root: str, decoder: Decoder) -> None:
        self.folder, self.root, self.decoder = folder, root, decoder
        self.layout, rows = read_manifest(self.folder)
        self.rows = {row.path: row for row in rows if not row.failure}

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`; the level depends on `short_side`, and one that was lost is the original."""
        file = self.locate(path, short_side)
        if file != path:
            with suppress(DecodeError):
                video = self.decoder.open(file, short_side)
                if start := self.rows[relative(path, self.root)].start:
                    video.times = video.times + start
                return video
        return self.decoder.open(path, short_side)

    def locate(self, path: str, short_side: int | None) -> str:
        """The file that is read in place of an original for a short side: a level of it, or the original."""
        name = relative(path, self.root)
        row = self.rows.get(name)
        side = self._side(row.short_side if row else None, short_side)
        return path if side is None else level_path(self.folder, side, name)

    def _side(self, original: int | None, drawn: int | None) -> int | None:
        """The smallest level that is enlarged no more than the base grid enlarges the original at its largest."""
        if original is None or drawn is None:
            return None
        needed = drawn * min(1, original / self.layout.largest)
        return next((side for side in self.layout.sides if min(side, original) >= needed), None)


def build(
    folder: str,
    root: str,
    paths: Sequence[str],
    layout: Layout,
    processes: int | None = None,
    progress: Progress = silent,
    estimate: Callable[[int], None] = lambda level_bytes: None,
) -> list[ManifestRow]:
    """Encode the videos `paths` (relative to `root`) and return the manifest's rows; goes on where it was stopped.

    `estimate` is told, once a few videos are done, how many bytes all will take; UserError where there is no room.
    A video that cannot be encoded keeps its place in the manifest, with the reason.
    """
    if is_remote(folder):
        raise UserError(f"{folder}: build the pyramid in a local folder, and copy it there as it is")
    place = Path(strip_file_scheme(folder))
    outside = next((path for path in paths if os.path.normpath(path).split(os.sep)[0] in ("", os.pardir)), None)
    if outside is not None:
        raise UserError(f"{outside} is not under {root}: a pyramid holds what is; set dataset.root to a folder above")
    place.mkdir(parents=True, exist_ok=True)
    done = _resume(place, layout)
    left = sorted({path for path in paths if path not in done})
    sample = min(SAMPLE, len(left))
    # those that the estimate is made from stand for all: files that are neighbours are alike
    left = list(dict.fromkeys([*(left[i * len(left) // sample] for i in range(sample)), *left]))
    encode = partial(encode_video, folder, root, layout)
    with (
        open(place / "rows.jsonl", "a", encoding="utf-8") as manifest,
        closing(parallel(encode, left, processes)) as rows,
    ):
        for number, row in enumerate(rows, start=1):
            manifest.write(json.dumps(asdict(row)) + "\n")
            manifest.flush()
            done[row.path] = row
            progress(number, len(left))
            if number == sample:
                estimate(_check_room(place, root, left, done))
    return [done[path] for path in dict.fromkeys(paths)]


def level_path(folder: str, side: int, name: str) -> str:
    """Where a level of a video is: a file or a URL."""
    return join(folder, f"short{side}/{name}.mp4")


def read_manifest(folder: str) -> tuple[Layout, list[ManifestRow]]:
    """The layout and rows of a pyramid, in a folder or at a URL; raises UserError."""
    try:
        layout = json.loads(read_bytes(join(folder, "layout.json")))
        lines = read_bytes(join(folder, "rows.jsonl")).decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"dataset.pyramid: no pyramid in {folder} ({error.strerror}); build it with tools/prepare_data.py"
        ) from None
    rows = {}
    for line in lines:
        try:
            row = ManifestRow(**json.loads(line))
        except ValueError:  # a line that a killed builder did not finish
            continue
        rows[row.path] = row
    return Layout(tuple(layout["sides"]), layout["largest"]), list(rows.values())


def _resume(folder: Path, layout: Layout) -> dict[str, ManifestRow]:
    """What is there of a pyramid with this layout; starts its manifest where nothing is."""
    if not (folder / "layout.json").exists():
        (folder / "rows.jsonl").touch()
        (folder / "layout.json").write_text(json.dumps(asdict(layout)) + "\n", encoding="utf-8")
        return {}
    old, rows = read_manifest(str(folder))
    if old != layout:
        raise UserError(f"{folder}: holds a pyramid of levels {old.sides}, not {layout.sides}; choose another folder")
    # rewritten whole, so that what comes next does not continue an unfinished line
    part = folder / "rows.jsonl.part"
    part.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    part.replace(folder / "rows.jsonl")
    return {row.path: row for row in rows if not row.failure}


def _check_room(folder: Path, root: str, paths: Sequence[str], done: dict[str, ManifestRow]) -> int:
    """Bytes that the levels of `paths` will take, from those that are done; raises UserError where there is no room."""
    rows = [done[path] for path in paths if path in done]
    ratio = sum(row.level_bytes for row in rows) / max(1, sum(row.bytes for row in rows))
    if is_remote(root):  # not asked of the server for each
        size = len(paths) * sum(row.bytes for row in rows) // max(1, len(rows))
    else:
        size = sum(os.path.getsize(file) for path in paths if os.path.isfile(file := join(root, path)))
    total, made = round(ratio * size), sum(row.level_bytes for row in rows)
    free = shutil.disk_usage(folder).free
    if total - made > free:
        raise UserError(f"{folder}: the pyramid needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    return total


def encode_video(folder: str, root: str, layout: Layout, name: str) -> ManifestRow:
    """Encode and verify all levels of one video, upright; they appear under their names when they are whole."""
    source = join(root, name)
    parts: dict[Path, Path] = {}
    try:
        with errors_over(source), _errors_over_levels(folder):
            for side in layout.sides:
                final = Path(level_path(folder, side, name))
                final.parent.mkdir(parents=True, exist_ok=True)
                parts[final] = final.with_name(f".{final.name}.part.mp4")
            with PyAV().open(source) as video:
                short_side, frames, original = min(video.height, video.width), video.frames, video.local
                sides = (min(side, short_side) for side in layout.sides)
                _encode(video, list(zip(parts.values(), sides, strict=True)))
                start = float(video.times[0])
            for part in parts.values():
                with PyAV().open(str(part)) as level:
                    if level.frames != frames:
                        raise DecodeError(source, f"{frames} frames became {level.frames}")
            level_bytes = sum(part.stat().st_size for part in parts.values())
            for final, part in parts.items():
                part.replace(final)
            return ManifestRow(name, short_side, frames, start, os.path.getsize(original), level_bytes)
    except DecodeError as error:
        return ManifestRow(name, failure=error.reason)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


@contextmanager
def _errors_over_levels(folder: str) -> Iterator[None]:
    """Turn an OSError over the pyramid's own folder, such as a full disk, into a UserError: no original is at fault."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or (
            error.filename is not None and belongs_to(error.filename, strip_file_scheme(folder))
        ):
            raise UserError(f"cannot write into {folder}: {error.strerror}; a repeat goes on") from error
        raise


def _encode(video: PyAVVideo, targets: Sequence[tuple[Path, int]]) -> None:
    """Decode once, encode at each short side; frames keep their times."""
    with ExitStack() as stack:
        outputs: list[tuple[Any, Any]] = []
        for time, frame in zip(video.rising_ticks(), video.walk(), strict=True):
            if not outputs:
                outputs = [_output(stack, video, frame, *target) for target in targets]
            for output, encoder in outputs:
                height, width = video.orientation.size(encoder.height, encoder.width)
                smaller = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
                if not video.orientation.upright:
                    smaller = _turned(smaller, video.orientation)
                smaller.pts, smaller.time_base = time, video.stream.time_base
                smaller.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses its own keyframes
                output.mux(encoder.encode(smaller))
        for output, encoder in outputs:
            output.mux(encoder.encode())


def _turned(frame: Any, orientation: Orientation) -> Any:
    """A `yuv420p` frame as it is shown."""
    h, w = frame.height, frame.width
    planes = np.split(frame.to_ndarray().ravel(), [h * w, h * w * 5 // 4])
    sizes = (h, w), (h // 2, w // 2), (h // 2, w // 2)
    upright = [orientation.apply(plane.reshape(size)) for plane, size in zip(planes, sizes, strict=True)]
    joined = np.concatenate([plane.ravel() for plane in upright])
    return av.VideoFrame.from_ndarray(joined.reshape(-1, upright[0].shape[1]), format="yuv420p")


def _output(stack: ExitStack, video: PyAVVideo, frame: Any, path: Path, short_side: int) -> tuple[Any, Any]:
    output = stack.enter_context(av.open(str(path), "w"))
    encoder: Any = output.add_stream("libx264", rate=video.stream.average_rate or 25, options=OPTIONS)
    scale = short_side / min(frame.height, frame.width)
    # H.264's colours come in blocks of 2 × 2
    height, width = (max(2, 2 * round(side * scale / 2)) for side in (frame.height, frame.width))
    encoder.height, encoder.width = video.orientation.size(height, width)
    encoder.pix_fmt = "yuv420p"
    encoder.codec_context.time_base = video.stream.time_base
    for field in COLOURS:
        setattr(encoder.codec_context, field, getattr(frame, field))
    return output, encoder
