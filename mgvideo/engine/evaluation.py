"""Scores of whole videos from several views of each, exact on any number of ranks, and precise BN before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgvideo.distributed.collectives import all_reduce, bn_process_group, gather_objects, rank, world_size
from mgvideo.distributed.signals import raise_if_stopped
from mgvideo.layers.batchnorm import GroupBatchNorm3d, deferred_running_stats, set_bn_groups
from mgvideo.layers.dropout import dropout_of
from mgvideo.loading.loader import Batch, Loader
from mgvideo.loading.random_streams import Stream, random_seed
from mgvideo.loading.requests import DecodeFailure
from mgvideo.loading.sampler import ClipSampler, request_views
from mgvideo.plan.plan import Grid

from .micro_batches import explain_out_of_memory, split_into_micro_batches
from .precision import Normalize, Precision
from .tasks import Task

# told (batches done, of how many, whether the next is being waited for, or the other ranks, not computed)
ProgressCallback = Callable[[int, int, bool], None]


@dataclass(frozen=True)
class Views:
    """How a video is looked at: `clips` clips spread over it, `crops` crops of each, at `grid`."""

    grid: Grid
    clips: int = 1
    crops: int = 1


@dataclass(frozen=True)
class Scores:
    """Scores `[videos, classes]` (NaN rows for videos that failed), labels, and what failed."""

    scores: Tensor
    labels: Tensor
    failures: tuple[DecodeFailure, ...]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on all videos of a loader's dataset."""

    loader: Loader
    task: Task
    classes: int
    normalize: Normalize
    precision: Precision
    batch: int = 8  # clips before cropping that a rank runs at once

    def __call__(self, model: nn.Module, views: Views, beat: ProgressCallback = lambda *_: None) -> Scores:
        """Run every view of every video once, whatever the number of ranks; all ranks get all scores.

        Views are dealt out among ranks, and per-video sums (or maxima) meet in one reduction, so that an uneven tail
        needs no padding. `beat` is told of each batch on every rank.
        """
        videos = len(self.loader.dataset)
        own = range(rank(), videos * views.clips, world_size())
        requests = partial(request_views, views.grid, views.clips, views.crops, own, self.batch)
        device, steps = self.precision.device, range(-(-len(own) // self.batch))
        scores, seen = torch.zeros(videos, self.classes, device=device), torch.zeros(videos, device=device)
        labels = self.task.no_labels(videos, self.classes).to(device)
        failures: list[DecodeFailure] = []
        model.eval()
        beat(0, len(steps), True)
        with torch.no_grad():
            for step, batch in enumerate(self.loader.load_steps(requests, steps)):
                raise_if_stopped()
                beat(step, len(steps), False)
                indices = batch.indices.to(device, non_blocking=True)
                if self.task.reduce == "sum":
                    scores.index_add_(0, indices, self._forward(model, batch))  # deterministic on GPUs too
                else:
                    rows = indices[:, None].expand(-1, self.classes)
                    scores.scatter_reduce_(0, rows, self._forward(model, batch), "amax")
                seen.index_add_(0, indices, torch.ones_like(indices, dtype=seen.dtype))
                labels[indices] = batch.labels.to(device, non_blocking=True)
                failures += batch.failures
                beat(step + 1, len(steps), True)
        all_reduce(scores, dist.ReduceOp.SUM if self.task.reduce == "sum" else dist.ReduceOp.MAX)
        all_reduce(labels, dist.ReduceOp.MAX)
        if self.task.reduce == "sum":
            scores /= all_reduce(seen)[:, None]
        # a video counts once, whatever the reasons that its views give
        by_video: dict[int, DecodeFailure] = {}
        for failure in (failure for part in gather_objects(failures) for failure in part):
            by_video.setdefault(failure.index, failure)
        scores[list(by_video)] = float("nan")
        return Scores(scores.cpu(), labels.cpu(), tuple(by_video.values()))

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        with explain_out_of_memory(partial(self._explain_out_of_memory, batch)), self.precision.autocast():
            clips = batch.clips.to(self.precision.device, non_blocking=True)
            logits = model(self.normalize(clips))
            return self.task.scores(logits.float())

    def _explain_out_of_memory(self, batch: Batch) -> str:
        """Where memory ran out, and the key to lower."""
        clips, frames, size = batch.clips.shape[:3]
        lower = (
            f"test.batch_size={self.batch // 2} (now {self.batch})"
            if self.batch > 1
            else "test.num_crops=1 or less test.crop_size"
        )
        return f"in evaluation, where this rank runs {clips} crops of {frames}×{size}² at once: try {lower}"


def precise_bn(
    model: nn.Module,
    loader: Loader,
    sampler: ClipSampler,
    batches: int,
    normalize: Normalize,
    precision: Precision,
    micro_batch_clips: int,
    beat: ProgressCallback = lambda *_: None,
) -> None:
    """Replace BN's running statistics by those of the sampler's first `batches` global batches, equal on all ranks.

    Every BN group of every batch has the same weight, whichever rank it is on; at most `micro_batch_clips` clips are run at
    once. After an exception the running statistics are as before.
    """
    if not any(isinstance(module, GroupBatchNorm3d) for module in model.modules()):
        return
    requests = partial(sampler.shard, rank=rank(), world_size=world_size())
    model.train()
    with torch.no_grad(), deferred_running_stats(model, momentum=1.0):
        beat(0, batches, True)
        for done, batch in enumerate(loader.load_steps(requests, range(batches))):
            raise_if_stopped()
            shard = batch.shard
            assert shard is not None, "the sampler's batches carry their shard"
            group, seed = bn_process_group(len(shard.ranks)), random_seed(sampler.seed, Stream.DROPOUT, done)
            clips = batch.clips.to(precision.device, non_blocking=True)
            for start, stop, groups in split_into_micro_batches(shard, micro_batch_clips):
                beat(done, batches, False)
                set_bn_groups(model, groups, group)
                torch.manual_seed(seed)
                with dropout_of(model, shard.batch, shard.start + start, shard.start + stop), precision.autocast():
                    model(normalize(clips[start:stop]))
            beat(done + 1, batches, True)
