"""Multi-view evaluation of whole videos, with the same scores on any number of ranks, and precise BN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgvideo.distributed.collectives import all_reduce, gather_objects, rank, world_size
from mgvideo.distributed.signals import raise_if_stopped
from mgvideo.distributed.watchdog import Position
from mgvideo.layers.batchnorm import GroupBatchNorm3d, deferred_running_stats, set_bn_groups
from mgvideo.layers.dropout import dropout_for_clips
from mgvideo.loading.loader import Batch, Loader
from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.loading.requests import DecodeFailure
from mgvideo.loading.sampler import ClipSampler, request_views
from mgvideo.plan.plan import Grid

from .freezing import set_training_mode
from .micro_batches import explain_out_of_memory, split_into_micro_batches
from .precision import Normalize, Precision
from .tasks import Task
from .train_step import TrainStep

# Called with (number of batches done, number of batches, whether this rank waits for the next batch or for other ranks)
ProgressCallback = Callable[[int, int, bool], None]


@dataclass(frozen=True)
class Views:
    """The views of a video: `num_clips` clips spread over it, and `num_crops` crops of each, at `grid`."""

    grid: Grid
    num_clips: int = 1
    num_crops: int = 1

    @classmethod
    def of_size(cls, frames: int, stride: int, size: int, num_clips: int = 1, num_crops: int = 1) -> Views:
        """Return views of `frames` frames at one stride, whose short side is the crop size."""
        return cls(Grid(frames, size, (stride, stride), (size, size)), num_clips, num_crops)


@dataclass(frozen=True)
class Scores:
    """Scores `[videos, classes]`, with NaN rows for videos that could not be read, labels, and one failure for each."""

    scores: Tensor
    labels: Tensor
    failures: tuple[DecodeFailure, ...]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on all videos of a loader's dataset."""

    loader: Loader
    task: Task
    num_classes: int
    normalize: Normalize
    precision: Precision
    batch_size: int = 8  # clips, before cropping, that a rank runs at once

    def __call__(self, model: nn.Module, views: Views, progress_callback: ProgressCallback = lambda *_: None) -> Scores:
        """Run every view of every video exactly once, and return all scores on every rank.

        Each rank runs a part of the views. One reduction combines the per-video sums (or maxima), so an uneven last
        batch needs no padding. Every rank calls `progress_callback` for each of its batches.
        """
        videos = len(self.loader.dataset)
        rank_clips = range(rank(), videos * views.num_clips, world_size())
        requests = partial(request_views, views.grid, views.num_clips, views.num_crops, rank_clips, self.batch_size)
        device, steps = self.precision.device, range(-(-len(rank_clips) // self.batch_size))
        scores, num_views = torch.zeros(videos, self.num_classes, device=device), torch.zeros(videos, device=device)
        labels = self.task.zero_labels(videos, self.num_classes).to(device)
        failures: list[DecodeFailure] = []
        model.eval()
        progress_callback(0, len(steps), True)
        with torch.no_grad():
            for step, batch in enumerate(self.loader.load_steps(requests, steps)):
                raise_if_stopped()
                progress_callback(step, len(steps), False)
                indices = batch.indices.to(device, non_blocking=True)
                if self.task.reduce == "sum":
                    scores.index_add_(0, indices, self._forward(model, batch))  # deterministic on GPUs too
                else:
                    rows = indices[:, None].expand(-1, self.num_classes)
                    scores.scatter_reduce_(0, rows, self._forward(model, batch), "amax")
                num_views.index_add_(0, indices, torch.ones_like(indices, dtype=num_views.dtype))
                labels[indices] = batch.labels.to(device, non_blocking=True)
                failures += batch.failures
                progress_callback(step + 1, len(steps), True)
        all_reduce(scores, dist.ReduceOp.SUM if self.task.reduce == "sum" else dist.ReduceOp.MAX)
        all_reduce(labels, dist.ReduceOp.MAX)
        if self.task.reduce == "sum":
            scores /= all_reduce(num_views)[:, None]
        # Report one failure a video, even if its views failed for different reasons.
        failure_by_video: dict[int, DecodeFailure] = {}
        for failure in (failure for rank_failures in gather_objects(failures) for failure in rank_failures):
            failure_by_video.setdefault(failure.index, failure)
        scores[list(failure_by_video)] = float("nan")
        return Scores(scores.cpu(), labels.cpu(), tuple(failure_by_video.values()))

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores `[views, classes]` of a batch."""
        with explain_out_of_memory(partial(self._explain_out_of_memory, batch)), self.precision.autocast():
            clips = batch.clips.to(self.precision.device, non_blocking=True)
            logits = model(self.normalize(clips))
            return self.task.scores(logits.float())

    def _explain_out_of_memory(self, batch: Batch) -> str:
        """Say where memory ran out, and which config key to lower."""
        crops, frames, size = batch.clips.shape[:3]
        advice = (
            f"test.batch_size={self.batch_size // 2} (now {self.batch_size})"
            if self.batch_size > 1
            else "test.num_crops=1 or less test.crop_size"
        )
        return f"in evaluation, where this rank runs {crops} crops of {frames}×{size}² at once: try {advice}"


def report_batches(
    position: Position, order: tuple[int, int], where: str, hang_timeout: float, loads_here: bool
) -> ProgressCallback:
    """Return a callback that reports each batch outside of training as the position of this rank.

    Args:
        position: to report to.
        order: the step that was done before, and a number below 0 that orders the activities which follow it.
        where: the activity in words.
        hang_timeout: seconds that a batch may take; 0: no limit. Waiting for other ranks has no limit.
        loads_here: whether this process loads the batches; loader workers have their own time limit.
    """

    def on_progress(batches_done: int, batches: int, waiting: bool) -> None:
        has_time_limit = hang_timeout and (not waiting or (loads_here and batches_done < batches))
        limit = hang_timeout if has_time_limit else None
        position.report(f"{where}, batch {batches_done} of {batches}", (*order, batches_done), limit)

    return on_progress


def precise_bn(
    model: nn.Module,
    train_step: TrainStep,
    loader: Loader,
    sampler: ClipSampler,
    batches: int,
    progress_callback: ProgressCallback = lambda *_: None,
) -> None:
    """Replace BN's running statistics in `model` with those of the sampler's first `batches` global batches.

    Every BN group of every batch has the same weight, and all ranks get the same statistics. A rank runs at most
    `train_step.micro_batch_clips` clips of the base grid at once. An exception leaves the running statistics unchanged.
    Frozen parts of the network keep their statistics.

    Args:
        model: the network that `train_step` trains, or the average of its weights.
    """
    normalize, precision = train_step.normalize, train_step.precision
    set_training_mode(model, train_step.frozen)
    if not any(isinstance(module, GroupBatchNorm3d) and module.training for module in model.modules()):
        return
    requests = partial(sampler.shard, rank=rank(), world_size=world_size())
    with torch.no_grad(), deferred_running_stats(model, momentum=1.0):
        progress_callback(0, batches, True)
        for done, batch in enumerate(loader.load_steps(requests, range(batches))):
            raise_if_stopped()
            shard = batch.shard
            assert shard is not None, "the sampler's batches carry their shard"
            group, seed = (
                train_step.subgroups.of_size(len(shard.ranks)),
                random_seed(sampler.seed, Stream.DROPOUT, done),
            )
            clips = batch.clips.to(precision.device, non_blocking=True)
            limit = train_step.clips_per_micro_batch(sampler.plan.slot(done).grid)
            for start, stop, groups in split_into_micro_batches(shard, limit):
                progress_callback(done, batches, False)
                set_bn_groups(model, groups, group)
                torch.manual_seed(seed)
                with (
                    dropout_for_clips(model, shard.batch, shard.start + start, shard.start + stop),
                    precision.autocast(),
                ):
                    model(normalize(clips[start:stop]))
            progress_callback(done + 1, batches, True)
