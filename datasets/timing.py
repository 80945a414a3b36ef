"""Measure the CPU time of each stage of loading a clip, and the decoding speed of a bare video library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from mgvideo.loading.requests import ClipRequest, Sample
from mgvideo.storage.paths import local_copy

from .frame_table import open_stream
from .sampling import clip_indices, draw_clip
from .video import VideoDataset
from .videofile import Box, Decoder, Video

STAGES = ("open", "decode", "resize", "collate")  # resize includes crops, labels and the rest of the dataset


class Clock:
    """CPU seconds by stage, in memory that the workers and the main process share."""

    def __init__(self, workers: int) -> None:
        self.seconds = torch.zeros(max(1, workers), len(STAGES), dtype=torch.float64).share_memory_()

    @contextmanager
    def measure(self, stage: str, without: str | None = None) -> Iterator[None]:
        """Add the CPU time of the block to `stage`.

        `without`: do not count again the stages from this one up to `stage`, which are measured inside the block.
        """
        info = get_worker_info()
        row = self.seconds[info.id if info else 0]
        inner = slice(STAGES.index(without), STAGES.index(stage)) if without else slice(0)
        before, start = float(row[inner].sum()), time.process_time()
        try:
            yield
        finally:
            spent = time.process_time() - start - (float(row[inner].sum()) - before)
            row[STAGES.index(stage)] += spent

    def total(self) -> Tensor:
        """Return the CPU seconds of all workers so far, by stage: float64 `[stages]`."""
        return self.seconds.sum(0)


class TimedDecoder:
    """A decoder that records the CPU time of opening and reading in a clock."""

    def __init__(self, decoder: Decoder, clock: Clock) -> None:
        self.decoder, self.clock = decoder, clock

    def open(self, path: str, short_side: int | None = None) -> Video:
        """See `videofile.Decoder.open`."""
        with self.clock.measure("open"):
            return _TimedVideo(self.decoder.open(path, short_side), self.clock)


class _TimedVideo(Video):
    def __init__(self, video: Video, clock: Clock) -> None:
        self.video, self.clock, self.path = video, clock, video.path
        self.frames, self.times, self.height, self.width = video.frames, video.times, video.height, video.width

    def _read(self, indices: np.ndarray, box: Box) -> Tensor:
        with self.clock.measure("decode"):
            return self.video.read(indices, box)

    def close(self) -> None:
        with self.clock.measure("open"):
            self.video.close()


class TimedDataset:
    """A dataset that records all CPU time except opening and decoding as the stage `resize`."""

    def __init__(self, dataset: VideoDataset, clock: Clock) -> None:
        self.dataset, self.clock = dataset, clock

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: ClipRequest) -> Sample:
        with self.clock.measure("resize", without="open"):
            return self.dataset[request]


class DecodeOnlyDataset:
    """Decodes the frames that `dataset` would read, at full size, with the bare library; returns empty samples.

    Args:
        decode: One of DECODE_FUNCTIONS.
        locate: Returns the file to read for a path and a short side (`Pyramid.locate`).
    """

    def __init__(
        self,
        dataset: VideoDataset,
        decode: Callable[[str, Callable[[int], np.ndarray]], None],
        locate: Callable[[str, int], str] | None,
        clock: Clock,
    ) -> None:
        self.dataset, self.decode, self.locate, self.clock = dataset, decode, locate, clock

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: ClipRequest) -> Sample:
        draw = draw_clip(request, self.dataset.sampling)
        path = self.dataset.path(request.index)
        if self.locate is not None:
            path = self.locate(path, draw.short_side)
        with (
            self.clock.measure("decode"),
            suppress(Exception),
        ):  # a bad video; the benchmark of the full loader reports it
            self.decode(local_copy(path), lambda frames: clip_indices(request, draw, self.dataset.sampling, 0, frames))
        return Sample(torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(()), request.index)


def _decord(path: str, choose_frames: Callable[[int], np.ndarray]) -> None:
    import decord

    video = decord.VideoReader(path, num_threads=1)
    video.get_batch(choose_frames(len(video)))


def _torchcodec(path: str, choose_frames: Callable[[int], np.ndarray]) -> None:
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    video.get_frames_at(choose_frames(len(video)).tolist())


def _pyav(path: str, choose_frames: Callable[[int], np.ndarray]) -> None:
    """Seek to the keyframe before the first frame and decode up to the last, as common loaders do."""
    container, stream = open_stream(path, path)
    with container:
        first = stream.start_time or 0
        ticks = 1 / (stream.average_rate * stream.time_base)
        frames = stream.frames or sum(
            1 for packet in container.demux(stream) if packet.size
        )  # WebM does not store the number of frames
        times = {first + round(int(index) * ticks) for index in choose_frames(frames)}
        container.seek(min(times), stream=stream)
        for frame in container.decode(stream):
            if frame.pts in times:
                frame.to_ndarray(format="rgb24")
            if frame.pts is not None and frame.pts >= max(times):
                break


DECODE_FUNCTIONS: dict[str, Callable[[str, Callable[[int], np.ndarray]], None]] = {
    "decord": _decord,
    "pyav": _pyav,
    "torchcodec": _torchcodec,
}
