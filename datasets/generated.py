"""Make a dataset of mp4 files from a seed, on first use: the part that the embedded datasets share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from mgvideo.storage.files import replace_when_complete
from mgvideo.storage.paths import require_local_path

from .parallel import FileProgress, ignore_progress, parallel_map


@dataclass(frozen=True)
class VideoKnobs:
    """The settings that all generated datasets have."""

    train: int = 1024  # videos
    val: int = 256
    frames: int = 48
    height: int = 84
    width: int = 96
    fps: int = 24
    keyframe: int = 12  # frames from one keyframe to the next
    crf: int = 20  # x264's quality: smaller is better
    seed: int = 0

    @property
    def name(self) -> str:
        """Name of the dataset's folder, which contains a hash of the settings."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.train}+{self.val}-{self.frames}x{self.width}x{self.height}-{digest[:8]}"


class DrawnVideo(NamedTuple):
    """A video to write: its labels, and its frames, uint8 RGB `[h, w, 3]`."""

    labels: Sequence[int]
    frames: Iterator[NDArray[np.uint8]]


# (knobs, split, number in the split) → a video: a pure function of these, which other processes can import
DrawVideo = Callable[[Any, str, int], DrawnVideo]


def make_dataset(
    root: str,
    knobs: VideoKnobs,
    classes: Sequence[str],
    draw_video: DrawVideo,
    processes: int | None = None,
    progress: FileProgress = ignore_progress,
) -> Path:
    """Create the dataset under `root` unless it exists; returns its folder.

    The folder holds mp4 files, `train.csv` and `val.csv` (`path label`, several labels joined by `;`), `classes.txt`
    and `knobs.json`. It gets its name when it is complete. If several processes call this, one creates the dataset and
    the others wait. A repeat continues an interrupted build.
    """
    root = require_local_path("dataset.root", root)
    folder = Path(root) / knobs.name
    if folder.is_dir():
        return folder
    Path(root).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(root) / f".{knobs.name}.lock"):
        if not folder.is_dir():
            part = folder.with_name(f".{knobs.name}.part")
            _build(part, knobs, classes, draw_video, processes, progress)
            part.rename(folder)
    return folder


def _build(
    folder: Path,
    knobs: VideoKnobs,
    classes: Sequence[str],
    draw_video: DrawVideo,
    processes: int | None,
    progress: FileProgress,
) -> None:
    jobs = [(split, i) for split, count in (("train", knobs.train), ("val", knobs.val)) for i in range(count)]
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for line in parallel_map(partial(_make_video, folder, knobs, draw_video), jobs, processes):
        lines.append(line)
        progress(len(lines), len(jobs))
    for split in ("train", "val"):
        text = "".join(x for (s, _), x in zip(jobs, lines, strict=True) if s == split)
        (folder / f"{split}.csv").write_text(text, encoding="utf-8")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    (folder / "knobs.json").write_text(json.dumps(asdict(knobs), indent=2) + "\n", encoding="utf-8")


def _make_video(folder: Path, knobs: VideoKnobs, draw_video: DrawVideo, job: tuple[str, int]) -> str:
    """Write one video unless it exists; returns its line of the list file."""
    split, index = job
    video = draw_video(knobs, split, index)
    path = f"{split}/{index:05d}.mp4"
    if not (folder / path).exists():
        with replace_when_complete(folder / path) as part:
            write_video(part, video.frames, knobs)
    return f"{path} {';'.join(map(str, sorted(video.labels)))}\n"


def write_video(path: Path, frames: Iterator[NDArray[np.uint8]], knobs: VideoKnobs) -> None:
    """Encode RGB frames `[h, w, 3]` as H.264; the same frames give the same file."""
    with av.open(str(path), "w") as container:
        # One thread and no macroblock tree, because either makes the output of x264 differ between runs.
        options = {"preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        options |= {"crf": str(knobs.crf), "g": str(knobs.keyframe)}
        stream: Any = container.add_stream("libx264", rate=knobs.fps, options=options)
        stream.width, stream.height, stream.pix_fmt = knobs.width, knobs.height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
