"""A dataset of videos: turns a clip request into a uint8 clip and replaces videos that cannot be read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import index as to_int
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, DecodeFailure, Sample, View
from mgvideo.plan.plan import Grid
from mgvideo.storage.paths import join

from .array_file import SharedArrays, Strings
from .decoders import Box, DecodeError, Decoder, Decord, Video
from .frames import FrameFolders
from .sampling import ClipDraw, Sampling, clip_crops, clip_indices, draw_clip, frame_span, opening_short_side

WHOLE = (0.0, math.inf)  # span of a whole video, in seconds
MAX_TRIES = 10  # videos to try for one training clip before raising UserError


class VideoEntry(NamedTuple):
    """A video of a dataset: path relative to the root, label or labels, and the span to sample from in seconds."""

    path: str
    label: int | tuple[int, ...]
    span: tuple[float, float] = WHOLE


class VideoDataset:
    """Videos with labels; `dataset[request]` is a pure function of the request and the files.

    A label that is a tuple makes the dataset multi-label. `dataset[number]` is for people: the middle clip of a video.

    Attributes:
        grid: Shape of the clips `dataset[number]`; `build_data` sets it to that of the recipe.
        timed_labels: Whether the label of a training clip depends on the seconds of the video that it covers.
        notes: Messages for the user, printed when a run starts.
        missing: Videos that the annotations list but that do not exist. They are not part of the dataset.
        labels: The labels of all videos: int64 `[videos]`, or if it is multi-label, multi-hot bool `[videos, classes]`.
        frames_fps: Frames per second of a frame list, whose videos are folders of images; None: of another list.
        arrays: The lists behind paths, labels and spans, which processes share.
    """

    timed_labels = False
    grid: Grid | None = None

    def __init__(
        self,
        root: str,
        entries: Sequence[VideoEntry],
        class_names: Sequence[str],
        decoder: Decoder | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008
        notes: Sequence[str] = (),
        missing: Sequence[VideoEntry] = (),
        frames_fps: float | None = None,
        more_arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        header = {
            "root": root,
            "class_names": list(class_names),
            "sampling": asdict(sampling),
            "notes": list(notes),
            "missing": [[entry.path, entry.label, entry.span] for entry in missing],
            "frames_fps": frames_fps,
        }
        self._attach(SharedArrays({**_pack(entries, len(class_names)), **(more_arrays or {})}, header), decoder)

    @classmethod
    def from_arrays(cls, arrays: SharedArrays, decoder: Decoder | None) -> VideoDataset:
        """Return the dataset that another one's `arrays` describe."""
        dataset = cls.__new__(cls)
        dataset._attach(arrays, decoder)
        return dataset

    def _attach(self, arrays: SharedArrays, decoder: Decoder | None) -> None:
        """Set the attributes, of which those of each video are views of `arrays`, in one block of memory or one file.

        Not lists: each process that reads a list copies its memory pages, because it counts references.
        """
        header = arrays.header
        self.arrays, self.root, self.class_names = arrays, header["root"], list(header["class_names"])
        self.notes = list(header["notes"])
        self.missing = [
            VideoEntry(path, tuple(label) if isinstance(label, list) else label, (span[0], span[1]))
            for path, label, span in header["missing"]
        ]
        self.sampling = Sampling(**header["sampling"])
        self.decoder = Decord() if decoder is None else decoder
        self.frames_fps = header["frames_fps"]
        if self.frames_fps is not None:
            self.decoder = FrameFolders(self.frames_fps, decoder)
        self._attach_views()

    def _attach_views(self) -> None:
        self._paths, self.labels = Strings(self.arrays["paths"], self.arrays["path_bounds"]), self.arrays["labels"]
        self._spans = self.arrays.get("spans")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_paths", "labels", "_spans")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach_views()

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Return the path or URL of a video."""
        return join(self.root, self._paths[index])

    def entry(self, index: int) -> VideoEntry:
        """Return a video as the list gives it."""
        label = self.labels[index]
        labels = tuple(label.nonzero()[0].tolist()) if label.ndim else int(label)
        return VideoEntry(self._paths[index], labels, self._span(index))

    def _span(self, index: int) -> tuple[float, float]:
        if self._spans is None:
            return WHOLE
        start, end = self._spans[index].tolist()
        return start, end

    @property
    def has_spans(self) -> bool:
        """Whether some videos are sampled only from a span of seconds."""
        return self._spans is not None

    def fingerprint(self) -> str:
        """Hash the paths, spans and labels to 16 hex digits; datasets with equal fingerprints list the same videos."""
        stored: str | None = self.arrays.header.get("fingerprint")
        if stored:
            return stored
        digest = hashlib.sha256()
        for number, part in enumerate(self._fingerprint_parts()):
            digest.update(b"\n" + part if number else part)
        return digest.hexdigest()[:16]

    def _fingerprint_parts(self) -> Iterator[bytes]:
        """Yield everything that the fingerprint covers."""
        yield from map(self._paths.raw, range(len(self)))
        yield (np.tile(WHOLE, (len(self), 1)) if self._spans is None else self._spans).tobytes()
        yield self.labels.tobytes()

    def label(self, index: int, seconds: tuple[float, float] | None = None) -> Tensor:
        """Return the label of a video, or of the `seconds` that a training clip covers.

        See `mgvideo.loading.requests.Sample` for shape and dtype.
        """
        label = self.labels[index]
        return torch.tensor(label, dtype=torch.float32 if label.ndim else torch.int64)

    def __getitem__(self, request: ClipRequest | SupportsIndex) -> Sample:
        """Load the clip of a request, or the middle clip of a video; see `mgvideo.loading.requests.Sample`.

        If a training video cannot be read, another video is drawn with the request's own seed. A test view of such a
        video is black. In both cases the sample lists the failures.

        The clip of a number has the shape `grid`, the middle frames of the video and the centre of the frame. Negative
        numbers count from the end.

        Raises:
            UserError: `MAX_TRIES` videos in a row cannot be read, or a number is given without a `grid`.
            DecodeError: The video with this number cannot be read.
            IndexError: There is no video with this number.
        """
        if not isinstance(request, ClipRequest):
            return self._middle_clip(to_int(request))
        if request.view is not None:
            return self._view(request)
        index = request.index
        failures: list[DecodeFailure] = []
        substitutes: np.random.Generator | None = None  # created only after a failure
        for _ in range(MAX_TRIES):
            try:
                clip, seconds = self._read(index, request)
                return Sample(clip, self.label(index, seconds), index, tuple(failures))
            except DecodeError as error:
                failures.append(DecodeFailure(index, error.path, error.reason))
                substitutes = substitutes or np.random.default_rng((request.seed, len(self)))
                index = int(substitutes.integers(len(self)))
        raise UserError(
            f"{MAX_TRIES} videos in a row cannot be read, the last one {failures[-1].path}: {failures[-1].reason}"
        )

    def _middle_clip(self, number: int) -> Sample:
        if not -len(self) <= number < len(self):
            raise IndexError(f"video {number} of a dataset of {len(self)}")
        if self.grid is None:
            raise UserError("dataset[number] needs a clip shape: set dataset.grid, or build it with build_data(cfg)")
        index = number % len(self)
        clip, _ = self._read(index, ClipRequest(index, self.grid, 0, View(0, 1, 1)))
        return Sample(clip[0], self.label(index), index)

    def _view(self, request: ClipRequest) -> Sample:
        assert request.view is not None
        failures: tuple[DecodeFailure, ...] = ()
        try:
            clip, _ = self._read(request.index, request)
        except DecodeError as error:
            failures = (DecodeFailure(request.index, error.path, error.reason),)
            grid = request.grid
            clip = torch.zeros(request.view.crops, grid.frames, grid.size, grid.size, 3, dtype=torch.uint8)
        return Sample(clip, self.label(request.index), request.index, failures)

    def load_repeats(self, requests: Sequence[ClipRequest]) -> list[Sample]:
        """Load training clips of one video, which is decoded once. Each is the same as `self[request]`.

        The requests have the same index and `repeats`.
        """
        index = requests[0].index
        try:
            clips = self._read_clips(index, requests)
        except DecodeError:  # some of the clips may be readable
            return [self[request] for request in requests]
        return [Sample(clip, self.label(index, seconds), index) for clip, seconds in clips]

    def _read(self, index: int, request: ClipRequest) -> tuple[Tensor, tuple[float, float] | None]:
        """Read a clip, crop it, then resize it. Also return the seconds that it covers if `timed_labels`."""
        return self._read_clips(index, [request])[0]

    def _read_clips(
        self, index: int, requests: Sequence[ClipRequest]
    ) -> list[tuple[Tensor, tuple[float, float] | None]]:
        """Read clips of one video as in `_read`; several have the same `repeats` and no view."""
        draws = [draw_clip(request, self.sampling) for request in requests]
        with self.decoder.open(self.path(index), opening_short_side(requests[0], self.sampling)) as video:
            first, stop, span = 0, video.frames, self._span(index)
            if span != WHOLE:
                first, stop = frame_span(span, video.times)
            if first >= stop:
                raise DecodeError(video.path, f"ends before {span[0]:g} s, where its span starts")
            clips = list(zip(requests, draws, strict=True))
            indices = [clip_indices(request, draw, self.sampling, first, stop, video) for request, draw in clips]
            crops = [clip_crops(request, draw, self.sampling, video.height, video.width) for request, draw in clips]
            parts = _read_boxes(video, indices, [crop.box for crop in crops])
            times = [(float(video.times[i[0]]), float(video.times[i[-1]])) for i in indices]
        cropped = [crop.apply(part, self.sampling.antialias) for crop, part in zip(crops, parts, strict=True)]
        finished = [_finish(*clip, frames) for clip, frames in zip(clips, cropped, strict=True)]
        return list(zip(finished, times if self.timed_labels else [None] * len(times), strict=True))


def _read_boxes(video: Video, indices: Sequence[np.ndarray], boxes: Sequence[Box]) -> list[Tensor]:
    """Read the frames of several clips, each cropped to its box, in one pass over the video."""
    if len(indices) == 1:
        return [video.read(indices[0], boxes[0])]
    top, left = min(box.top for box in boxes), min(box.left for box in boxes)
    bottom, right = max(box.top + box.height for box in boxes), max(box.left + box.width for box in boxes)
    union = np.unique(np.concatenate(indices))
    frames = video.read(union, Box(top, left, bottom - top, right - left))
    return [
        box._replace(top=box.top - top, left=box.left - left).crop(frames[torch.from_numpy(np.searchsorted(union, i))])
        for i, box in zip(indices, boxes, strict=True)
    ]


def _finish(request: ClipRequest, draw: ClipDraw, crops: Sequence[Tensor]) -> Tensor:
    """Return the crops of a view, stacked, or the one crop of a training clip, mirrored if drawn."""
    if request.view is not None:
        return torch.stack(list(crops))
    return crops[0].flip(2) if draw.flip else crops[0].contiguous()


def _pack(entries: Sequence[VideoEntry], classes: int) -> dict[str, np.ndarray]:
    """Return the arrays of a list of videos: paths, labels, and spans if a video has one."""
    paths = Strings.pack([entry.path for entry in entries])
    arrays = {
        "paths": paths.content,
        "path_bounds": paths.bounds,
        "labels": _label_array([entry.label for entry in entries], classes),
    }
    if any(entry.span != WHOLE for entry in entries):
        arrays["spans"] = np.array([entry.span for entry in entries], np.float64)
    return arrays


def _label_array(labels: Sequence[int | tuple[int, ...]], classes: int) -> np.ndarray:
    """Return labels as int64 `[videos]`, or multi-hot bool `[videos, classes]` if any is a tuple."""
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, np.int64)
    multi_hot = np.zeros((len(labels), classes), bool)
    for row, label in zip(multi_hot, labels, strict=True):
        row[list(label) if isinstance(label, tuple) else label] = True
    return multi_hot
