"""A dataset of videos: turns a clip request into a uint8 clip and replaces videos that cannot be read."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from operator import index as to_int
from typing import NamedTuple, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, DecodeFailure, Sample, View
from mgvideo.plan.plan import Grid
from mgvideo.storage.paths import join

from .decoders import Box, DecodeError, Decoder, Decord, Video
from .sampling import ClipDraw, Sampling, clip_crops, clip_indices, draw_clip, frame_span, opening_short_side

MAX_TRIES = 10  # videos to try for one training clip before raising UserError


class VideoEntry(NamedTuple):
    """A video of a dataset: path relative to the root, label or labels, and the span to sample from in seconds."""

    path: str
    label: int | tuple[int, ...]
    span: tuple[float, float] = (0, math.inf)


class VideoDataset:
    """Videos with labels; `dataset[request]` is a pure function of the request and the files.

    A label that is a tuple makes the dataset multi-label. `dataset[number]` is for people: the middle clip of a video.

    Attributes:
        grid: Shape of the clips `dataset[number]`; `build_data` sets it to that of the recipe.
        timed_labels: Whether the label of a training clip depends on the seconds of the video that it covers.
        notes: Messages for the user, printed when a run starts.
        missing: Videos that the annotations list but that do not exist. They are not part of the dataset.
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
    ) -> None:
        self.root, self.class_names, self.notes, self.missing = root, list(class_names), list(notes), list(missing)
        self.decoder, self.sampling = Decord() if decoder is None else decoder, sampling
        # Arrays, not lists: reference counting makes forked workers copy the memory pages of a list.
        self._paths = np.array([os.fsencode(entry.path) for entry in entries])
        self._spans = np.array([entry.span for entry in entries])
        self.labels = _label_array([entry.label for entry in entries], len(self.class_names))

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Return the path or URL of a video."""
        return join(self.root, os.fsdecode(self._paths[index]))

    def entry(self, index: int) -> VideoEntry:
        """Return a video as the list gives it."""
        label, (start, end) = self.labels[index], self._spans[index].tolist()
        labels = tuple(label.nonzero()[0].tolist()) if label.ndim else int(label)
        return VideoEntry(os.fsdecode(self._paths[index]), labels, (start, end))

    @property
    def has_spans(self) -> bool:
        """Whether some videos are sampled only from a span of seconds."""
        return bool((self._spans != (0, math.inf)).any())

    def fingerprint(self) -> str:
        """Hash the paths, spans and labels to 16 hex digits; datasets with equal fingerprints list the same videos."""
        return hashlib.sha256(b"\n".join(self._fingerprint_parts())).hexdigest()[:16]

    def _fingerprint_parts(self) -> list[bytes]:
        """Return everything that the fingerprint covers."""
        return [*self._paths.tolist(), self._spans.tobytes(), self.labels.tobytes()]

    def label(self, index: int, seconds: tuple[float, float] | None = None) -> Tensor:
        """Return the label of a video, or of the `seconds` that a training clip covers.

        See `mgvideo.loading.requests.Sample` for shape and dtype.
        """
        label = torch.as_tensor(self.labels[index])
        return label.float() if label.ndim else label

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
            first, stop, span = 0, video.frames, self._spans[index].tolist()
            if span != [0, math.inf]:
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


def _label_array(labels: Sequence[int | tuple[int, ...]], classes: int) -> np.ndarray:
    """Return labels as int64 `[videos]`, or multi-hot bool `[videos, classes]` if any is a tuple."""
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, np.int64)
    multi_hot = np.zeros((len(labels), classes), bool)
    for row, label in zip(multi_hot, labels, strict=True):
        row[list(label) if isinstance(label, tuple) else label] = True
    return multi_hot
