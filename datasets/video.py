"""A dataset of videos: from a request to a uint8 clip, with a substitute for a video that cannot be read."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest, DecodeFailure, Sample
from mgvideo.storage.paths import join

from .decoders import DecodeError, Decoder, Decord
from .sampling import Sampling, choose, clip_indices, crop_boxes, frame_span

TRIES = 10  # videos to try for one training clip before giving up


class VideoEntry(NamedTuple):
    """A video of a dataset: its path relative to the dataset's root, its label or labels, the seconds that count."""

    path: str
    label: int | tuple[int, ...]
    span: tuple[float, float] = (0, math.inf)


class VideoDataset:
    """Videos with labels; `dataset[request]` is a pure function of the request and the files.

    A label that is a tuple makes the dataset multi-label. `notes` are what whoever starts a run should know, `missing`
    the videos that the annotations list but that are not there, and so no part of the dataset. `timed_labels`: the
    label of a training clip depends on the stretch of its video that it covers.
    """

    timed_labels = False

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
        # arrays, not lists: workers forked from this process would copy a list by counting its references
        self._paths = np.array([os.fsencode(entry.path) for entry in entries])
        self._spans = np.array([entry.span for entry in entries])
        self.labels = _label_array([entry.label for entry in entries], len(self.class_names))

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Where a video is: a file or a URL."""
        return join(self.root, os.fsdecode(self._paths[index]))

    def entry(self, index: int) -> VideoEntry:
        """A video as it is listed."""
        label, (start, end) = self.labels[index], self._spans[index].tolist()
        labels = tuple(label.nonzero()[0].tolist()) if label.ndim else int(label)
        return VideoEntry(os.fsdecode(self._paths[index]), labels, (start, end))

    @property
    def timed(self) -> bool:
        """Whether of some videos only a stretch counts."""
        return bool((self._spans != (0, math.inf)).any())

    def fingerprint(self) -> str:
        """A short hash of the list of videos and labels: two datasets that share it serve the same clips."""
        return hashlib.sha256(b"\n".join(self._listed())).hexdigest()[:16]

    def _listed(self) -> list[bytes]:
        """All that a list says."""
        return [*self._paths.tolist(), self._spans.tobytes(), self.labels.tobytes()]

    def label(self, index: int, seconds: tuple[float, float] | None = None) -> Tensor:
        """Label of a video, or of the stretch of it that a training clip covers: see `mgvideo.loading.requests.Sample`."""
        label = torch.as_tensor(self.labels[index])
        return label.float() if label.ndim else label

    def __getitem__(self, request: ClipRequest) -> Sample:
        """The clip of a request: see `mgvideo.loading.requests.Sample`.

        Training draws a substitute for a video that cannot be read, from the request's own seed; raises UserError
        after ten in a row. A view of such a video is black. Either way the sample names the failures.
        """
        if request.view is not None:
            return self._view(request)
        index = request.index
        failures: list[DecodeFailure] = []
        substitutes: np.random.Generator | None = None  # made for the few that need it
        for _ in range(TRIES):
            try:
                clip, seconds = self._read(index, request)
                return Sample(clip, self.label(index, seconds), index, tuple(failures))
            except DecodeError as error:
                failures.append(DecodeFailure(index, error.path, error.reason))
                substitutes = substitutes or np.random.default_rng((request.seed, len(self)))
                index = int(substitutes.integers(len(self)))
        raise UserError(
            f"{TRIES} videos in a row cannot be read, the last one {failures[-1].path}: {failures[-1].reason}"
        )

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

    def _read(self, index: int, request: ClipRequest) -> tuple[Tensor, tuple[float, float] | None]:
        """A clip as `Sample` describes it, cropped before it is resized, and, for `timed_labels`, its seconds."""
        choice = choose(request, self.sampling)
        with self.decoder.open(self.path(index), choice.short_side) as video:
            first, stop, span = 0, video.frames, self._spans[index].tolist()
            if span != [0, math.inf]:
                first, stop = frame_span(span, video.times)
            if first >= stop:
                raise DecodeError(video.path, f"ends before {span[0]:g} s, where its stretch begins")
            indices = clip_indices(request, choice, self.sampling, first, stop)
            boxes = crop_boxes(request, choice, video.height, video.width)
            frames = video.read(indices, boxes[0] if request.view is None else None)
            seconds = (float(video.times[indices[0]]), float(video.times[indices[-1]])) if self.timed_labels else None
        size = request.grid.size
        if request.view is not None:
            return torch.stack([resize(box.of(frames), size) for box in boxes]), seconds
        clip = resize(frames, size)
        return clip.flip(2) if choice.flip else clip, seconds


def resize(frames: Tensor, size: int) -> Tensor:
    """Square frames uint8 `[t, n, n, 3]` to contiguous `[t, size, size, 3]`, bilinear and antialiased."""
    if frames.shape[1] == size:
        return frames.contiguous()
    planes = interpolate(frames.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
    return planes.permute(0, 2, 3, 1).contiguous()


def _label_array(labels: Sequence[int | tuple[int, ...]], classes: int) -> np.ndarray:
    """Labels as int64 `[videos]`, or multi-hot bool `[videos, classes]`."""
    if all(isinstance(label, int) for label in labels):
        return np.array(labels, np.int64)
    hot = np.zeros((len(labels), classes), bool)
    for row, label in zip(hot, labels, strict=True):
        row[list(label) if isinstance(label, tuple) else label] = True
    return hot
