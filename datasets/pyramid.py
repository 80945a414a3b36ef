"""A pyramid: copies of a dataset's videos at a few sizes, from which a few frames can be read fast.

Each copy, a level, has every frame of the original, encoded as H.264 with a keyframe every eight frames, x264's
`fastdecode` and no B-frames. A reader opens the smallest level that is enlarged no more than the base grid enlarges the
original at the largest short side. For measurements of alternatives, see docs/benchmarks/data.md.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.filesize import decimal

from mgvideo.errors import UserError
from mgvideo.storage.files import parse_json_lines, replace_when_complete
from mgvideo.storage.members import parse_member
from mgvideo.storage.paths import belongs_to, is_remote, join, read_bytes, relative, strip_file_scheme

from .array_file import SharedArrays, Strings
from .inputs import record_input
from .listing import kept_arrays
from .orientation import Orientation
from .packet_index import PacketIndex
from .parallel import FileProgress, ignore_progress, parallel_map
from .pyav import PyAV, PyAVVideo
from .videofile import DecodeError, Decoder, Video, raise_decode_errors

KEYFRAME_INTERVAL = 8  # frames
OPTIONS = {
    "preset": "veryfast",
    "tune": "fastdecode",
    "crf": "20",
    "g": str(KEYFRAME_INTERVAL),
    "bf": "0",
    "threads": "1",
}
# fields of a frame that describe its colours
COLOUR_FIELDS = ("colorspace", "color_range", "color_primaries", "color_trc")
OUTSIDE = ".outside"  # folder of a level for videos outside the dataset's root, below which paths are absolute
SAMPLE_VIDEOS = 16  # number of videos to encode before estimating the size of the pyramid


@dataclass(frozen=True)
class PyramidLayout:
    """Short sides of a pyramid's levels (`sides`), and the largest short side that the base grid draws (`largest`)."""

    sides: tuple[int, ...]
    largest: int

    @classmethod
    def for_sizes(cls, sizes: Iterable[int], scales: tuple[int, int], original: int) -> PyramidLayout:
        """Return a layout with one level for each crop size of a plan.

        Args:
            sizes: Crop sizes of the plan.
            scales: Range of short sides of the base grid (`base.short_side`).
            original: Usual short side of the original videos.
        """
        sizes, top = sorted(set(sizes)), min(original, scales[1])
        return cls(tuple(2 * math.ceil(top * size / sizes[-1] / 2) for size in sizes), scales[1])


@dataclass(frozen=True)
class ManifestRow:
    """A video in a pyramid's manifest.

    Attributes:
        path: Name of the video, see `name_video`.
        short_side, frames, bytes: Of the original.
        start: Seconds at which the first frame of the original is shown.
        level_bytes: Size of all levels together.
        failure: Why the video has no levels; empty if it has.
    """

    path: str
    short_side: int = 0
    frames: int = 0
    start: float = 0.0
    bytes: int = 0
    level_bytes: int = 0
    failure: str = ""


class Pyramid:
    """A decoder that opens a level of the pyramid in `folder` instead of the original under `root`."""

    def __init__(self, folder: str, root: str, decoder: Decoder) -> None:
        self.folder, self.root, self.decoder = folder, root, decoder
        # arrays, which processes share, not rows: 300,000 take 150 MB, and each worker would have a copy
        self._arrays = kept_arrays(folder, "pyramid", partial(_manifest_arrays, folder))
        self.layout = PyramidLayout(tuple(self._arrays.header["sides"]), self._arrays.header["largest"])

    def open(self, path: str, short_side: int | None = None) -> Video:
        """Open the level for `short_side`, or the original if the level is missing; see `videofile.Decoder.open`."""
        found = self._find(path, short_side)
        if found is not None:
            file, start = found
            with suppress(DecodeError):
                video = self.decoder.open(file, short_side)
                if start:
                    video.times = video.times + start
                return video
        return self.decoder.open(path, short_side)

    def locate(self, path: str, short_side: int | None) -> str:
        """Return the file to read for a short side: a level of the original, or the original itself."""
        found = self._find(path, short_side)
        return path if found is None else found[0]

    def _find(self, path: str, short_side: int | None) -> tuple[str, float] | None:
        """Return the level to read and the time of its first frame in the original, or None to read the original."""
        name = name_video(path, self.root)
        row = Strings(self._arrays["names"], self._arrays["name_bounds"]).find(name)
        if row is None:
            return None
        side = self._side(int(self._arrays["short_sides"][row]), short_side)
        return None if side is None else (level_path(self.folder, side, name), float(self._arrays["starts"][row]))

    def _side(self, original: int, drawn: int | None) -> int | None:
        """Return the smallest level enlarged no more than the base grid at most enlarges the original, or None."""
        if drawn is None:
            return None
        needed = drawn * min(1, original / self.layout.largest)
        return next((side for side in self.layout.sides if min(side, original) >= needed), None)


def encode_pyramid(
    folder: str,
    root: str,
    paths: Sequence[str],
    layout: PyramidLayout,
    processes: int | None = None,
    progress: FileProgress = ignore_progress,
    estimate: Callable[[int], None] = lambda level_bytes: None,
    indexes: Mapping[str, PacketIndex] | None = None,
) -> list[ManifestRow]:
    """Encode the videos `paths` (relative to `root`, or absolute, or URLs) and return their rows of the manifest.

    Continues an interrupted build. A video that cannot be encoded has a row with `failure`.

    Args:
        processes: Number of worker processes; None: one a core.
        progress: Called with (videos done, videos to do) after each video.
        estimate: Called once with the estimated bytes of the whole pyramid, after `SAMPLE_VIDEOS` videos.
        indexes: The packet indexes to which the levels are added.

    Raises:
        UserError: The folder is a URL, holds another pyramid, cannot be written or is too small.
    """
    if is_remote(folder):
        raise UserError(f"{folder}: build the pyramid in a local folder and upload that")
    local_folder = Path(strip_file_scheme(folder))
    names = [name_video(join(root, path), root) for path in paths]
    local_folder.mkdir(parents=True, exist_ok=True)
    done = _resume(local_folder, layout)
    remaining = sorted({name for name in names if name not in done})
    sample = min(SAMPLE_VIDEOS, len(remaining))
    # Encode an evenly spaced sample first: neighbouring files are similar, so the first ones are a biased sample.
    spaced = (remaining[i * len(remaining) // sample] for i in range(sample))
    remaining = list(dict.fromkeys([*spaced, *remaining]))
    encode = partial(encode_video, folder, root, layout, indexes or {})
    with (
        open(local_folder / "rows.jsonl", "a", encoding="utf-8") as manifest,
        closing(parallel_map(encode, remaining, processes)) as rows,
    ):
        for number, row in enumerate(rows, start=1):
            manifest.write(json.dumps(asdict(row)) + "\n")
            manifest.flush()
            done[row.path] = row
            progress(number, len(remaining))
            if number == sample:
                estimate(_estimate_bytes(local_folder, root, remaining, done))
    return [done[name] for name in dict.fromkeys(names)]


def name_video(path: str, root: str) -> str:
    """Return the name of a video in a pyramid: its path relative to `root`, or if it is outside, absolute or a URL."""
    name = relative(path, root)
    if os.path.normpath(name).split(os.sep)[0] != os.pardir:
        return name
    return path if is_remote(path) else os.path.abspath(path)


def level_path(folder: str, side: int, name: str) -> str:
    """Return the path or URL of a level of a video. Those of videos outside the dataset's root are in a sub-folder."""
    if os.path.isabs(name) or is_remote(name):
        name = OUTSIDE + os.path.normpath(f"/{name.replace('://', '/').lstrip('/')}")
    name = name.replace(".tar@", ".tar/")  # an ordinary file, not one inside an archive
    return join(folder, f"short{side}/{name}.mp4")


def read_manifest(folder: str) -> tuple[PyramidLayout, list[ManifestRow]]:
    """Read the layout and rows of a pyramid in a folder or at a URL; raises UserError."""
    try:
        layout = json.loads(read_bytes(join(folder, "layout.json")))
        lines = read_bytes(join(folder, "rows.jsonl")).decode("utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"dataset.pyramid: no pyramid in {folder} ({error.strerror}); build it with tools/prepare_data.py"
        ) from None
    rows = {row.path: row for row in (ManifestRow(**record) for record in parse_json_lines(lines))}
    return PyramidLayout(tuple(layout["sides"]), layout["largest"]), list(rows.values())


def pyramid_levels(folder: str, root: str, paths: Iterable[str]) -> list[str]:
    """Return the levels in a pyramid of the videos `paths`; raises UserError."""
    layout, rows = read_manifest(folder)
    complete = {row.path for row in rows if not row.failure}
    names = [name for path in paths if (name := name_video(path, root)) in complete]
    return [level_path(folder, side, name) for name in names for side in layout.sides]


def _manifest_arrays(folder: str) -> SharedArrays:
    """Return the rows of a pyramid's manifest as arrays, sorted by name; raises UserError."""
    for name in ("layout.json", "rows.jsonl"):
        record_input(join(folder, name))
    layout, rows = read_manifest(folder)
    rows = sorted((row for row in rows if not row.failure), key=lambda row: os.fsencode(row.path))
    names = Strings.pack([row.path for row in rows])
    arrays = {
        "names": names.content,
        "name_bounds": names.bounds,
        "short_sides": np.array([row.short_side for row in rows], np.int32),
        "starts": np.array([row.start for row in rows], np.float64),
    }
    return SharedArrays(arrays, {**asdict(layout), "videos": len(rows)})


def _resume(folder: Path, layout: PyramidLayout) -> dict[str, ManifestRow]:
    """Return the finished rows of an interrupted build, or start a new manifest. Raises UserError if layouts differ."""
    if not (folder / "layout.json").exists():
        (folder / "rows.jsonl").touch()
        (folder / "layout.json").write_text(json.dumps(asdict(layout)) + "\n", encoding="utf-8")
        return {}
    old, rows = read_manifest(str(folder))
    if old != layout:
        raise UserError(f"{folder}: holds a pyramid of levels {old.sides}, not {layout.sides}; choose another folder")
    # Rewrite the manifest, because the next row must not continue an unfinished line.
    with replace_when_complete(folder / "rows.jsonl") as part:
        part.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    return {row.path: row for row in rows if not row.failure}


def _estimate_bytes(folder: Path, root: str, paths: Sequence[str], done: dict[str, ManifestRow]) -> int:
    """Estimate the bytes of the whole pyramid from finished rows; raises UserError if the disk is too small."""
    rows = [done[path] for path in paths if path in done]
    ratio = sum(row.level_bytes for row in rows) / max(1, sum(row.bytes for row in rows))
    if is_remote(root):  # saves a request for each file
        size = len(paths) * sum(row.bytes for row in rows) // max(1, len(rows))
    else:
        members = (parse_member(path) for path in paths)
        size = sum(member.size for member in members if member)
        size += sum(os.path.getsize(file) for path in paths if os.path.isfile(file := join(root, path)))
    total, written = round(ratio * size), sum(row.level_bytes for row in rows)
    free = shutil.disk_usage(folder).free
    if total - written > free:
        raise UserError(f"{folder}: the pyramid needs {decimal(total)}, {decimal(free)} are free")
    return total


def encode_video(
    folder: str, root: str, layout: PyramidLayout, indexes: Mapping[str, PacketIndex], name: str
) -> ManifestRow:
    """Encode and verify all levels of one video, upright. Levels get their final names when all are complete."""
    row = _encode_levels(folder, root, layout, name)
    if indexes and not row.failure:
        for side in layout.sides:
            PyAV(indexes=indexes).open(level_path(folder, side, name)).close()
    return row


def _encode_levels(folder: str, root: str, layout: PyramidLayout, name: str) -> ManifestRow:
    source = join(root, name)
    try:
        with raise_decode_errors(source), _raise_folder_errors(folder), ExitStack() as stack:
            parts: list[Path] = []
            for side in layout.sides:
                level_file = Path(level_path(folder, side, name))
                level_file.parent.mkdir(parents=True, exist_ok=True)
                parts.append(stack.enter_context(replace_when_complete(level_file)))
            with PyAV().open(source) as video:
                short_side, frames, original = min(video.height, video.width), video.frames, video.local
                sides = (min(side, short_side) for side in layout.sides)
                _encode(video, list(zip(parts, sides, strict=True)))
                start = float(video.times[0])
            for part in parts:
                with PyAV().open(str(part)) as level:
                    if level.frames != frames:
                        raise DecodeError(source, f"{frames} frames became {level.frames}")
            level_bytes = sum(part.stat().st_size for part in parts)
            member = parse_member(source)
            size = member.size if member else os.path.getsize(original)
            return ManifestRow(name, short_side, frames, start, size, level_bytes)
    except DecodeError as error:
        return ManifestRow(name, failure=error.reason)


@contextmanager
def _raise_folder_errors(folder: str) -> Iterator[None]:
    """Convert an OSError of the pyramid's folder, such as a full disk, to a UserError: the original is not damaged."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) or (
            error.filename is not None and belongs_to(error.filename, strip_file_scheme(folder))
        ):
            raise UserError(f"cannot write into {folder}: {error.strerror}; repeat the command to continue") from error
        raise


def _encode(video: PyAVVideo, targets: Sequence[tuple[Path, int]]) -> None:
    """Decode a video once and encode it at each short side of `targets`; frames keep their times."""
    with ExitStack() as stack:
        outputs: list[tuple[Any, Any]] = []
        for time, frame in zip(video.rising_ticks(), video.decode_all(), strict=True):
            if not outputs:
                outputs = [_open_output(stack, video, frame, *target) for target in targets]
            for output, encoder in outputs:
                height, width = video.orientation.size(encoder.height, encoder.width)
                smaller = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
                if not video.orientation.upright:
                    smaller = _rotate(smaller, video.orientation)
                smaller.pts, smaller.time_base = time, video.stream.time_base
                smaller.pict_type = av.video.frame.PictureType.NONE  # let the encoder choose the keyframes
                output.mux(encoder.encode(smaller))
        for output, encoder in outputs:
            output.mux(encoder.encode())


def _rotate(frame: Any, orientation: Orientation) -> Any:
    """Rotate and mirror a `yuv420p` frame for display."""
    h, w = frame.height, frame.width
    planes = np.split(frame.to_ndarray().ravel(), [h * w, h * w * 5 // 4])
    sizes = (h, w), (h // 2, w // 2), (h // 2, w // 2)
    upright = [orientation.apply(plane.reshape(size)) for plane, size in zip(planes, sizes, strict=True)]
    joined = np.concatenate([plane.ravel() for plane in upright])
    return av.VideoFrame.from_ndarray(joined.reshape(-1, upright[0].shape[1]), format="yuv420p")


def _open_output(stack: ExitStack, video: PyAVVideo, frame: Any, path: Path, short_side: int) -> tuple[Any, Any]:
    """Open an output file; returns its container and its video stream."""
    output = stack.enter_context(av.open(str(path), "w"))
    encoder: Any = output.add_stream("libx264", rate=video.stream.average_rate or 25, options=OPTIONS)
    scale = short_side / min(frame.height, frame.width)
    # H.264 with 4:2:0 chroma needs even sizes.
    height, width = (max(2, 2 * round(side * scale / 2)) for side in (frame.height, frame.width))
    encoder.height, encoder.width = video.orientation.size(height, width)
    encoder.pix_fmt = "yuv420p"
    encoder.codec_context.time_base = video.stream.time_base
    for field in COLOUR_FIELDS:
        setattr(encoder.codec_context, field, getattr(frame, field))
    return output, encoder
