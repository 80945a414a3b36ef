"""Scores of whole videos from several views of each, exact on any number of ranks, and precise BN before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn

from .batches import Batches, share
from .batchnorm import set_bn_groups
from .clips import ClipRequest, Failure, View
from .distributed import all_reduce, gather_objects, neighbours, rank, world_size
from .loader import Batch, Loader
from .microbatch import explain_out_of_memory, pieces
from .plan import Grid
from .precision import Normalize, Precision
from .signals import stop_if_asked
from .tasks import Task

# told (batches done, of how many, whether the next is being waited for, or the other ranks, not computed)
Beat = Callable[[int, int, bool], None]


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
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on all videos of a loader's dataset."""

    loader: Loader
    task: Task
    classes: int
    normalize: Normalize
    precision: Precision
    batch: int = 8  # clips before cropping that a rank runs at once

    def __call__(self, model: nn.Module, views: Views, beat: Beat = lambda *_: None) -> Scores:
        """Run every view of every video once, whatever the number of ranks; all ranks get all scores.

        Views are dealt out among ranks, and per-video sums (or maxima) meet in one reduction, so that an uneven tail
        needs no padding. `beat` is told of each batch on every rank.
        """
        videos = len(self.loader.dataset)
        mine = range(rank(), videos * views.clips, world_size())

        def requests(step: int) -> list[ClipRequest]:
            part = mine[step * self.batch : (step + 1) * self.batch]
            return [
                ClipRequest(i // views.clips, views.grid, 0, View(i % views.clips, views.clips, views.crops))
                for i in part
            ]

        device, steps = self.precision.device, range(-(-len(mine) // self.batch))
        scores, seen = torch.zeros(videos, self.classes, device=device), torch.zeros(videos, device=device)
        labels = self.task.no_labels(videos, self.classes).to(device)
        failures: list[Failure] = []
        model.eval()
        beat(0, len(steps), True)
        with torch.no_grad():
            for step, batch in enumerate(self.loader.open(requests, steps)):
                stop_if_asked()
                beat(step, len(steps), False)
                indices = batch.indices.to(device)
                if self.task.reduce == "sum":
                    scores.index_add_(0, indices, self._forward(model, batch))  # deterministic on GPUs too
                else:
                    rows = indices[:, None].expand(-1, self.classes)
                    scores.scatter_reduce_(0, rows, self._forward(model, batch), "amax")
                seen.index_add_(0, indices, torch.ones_like(indices, dtype=seen.dtype))
                labels[indices] = batch.labels.to(device)
                failures += batch.failures
                beat(step + 1, len(steps), True)
        all_reduce(scores, dist.ReduceOp.SUM if self.task.reduce == "sum" else dist.ReduceOp.MAX)
        all_reduce(labels, dist.ReduceOp.MAX)
        if self.task.reduce == "sum":
            scores /= all_reduce(seen)[:, None]
        # a video counts once, whatever the reasons that its views give
        by_video: dict[int, Failure] = {}
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
            f"test.batch={self.batch // 2} (now {self.batch})" if self.batch > 1 else "test.crops=1 or less test.size"
        )
        return f"in evaluation, where this rank runs {clips} crops of {frames}×{size}² at once: try {lower}"


def precise_bn(
    model: nn.Module,
    loader: Loader,
    batches: Batches,
    steps: int,
    normalize: Normalize,
    precision: Precision,
    max_clips: int,
    beat: Beat = lambda *_: None,
) -> None:
    """Replace BN's running statistics by those of `steps` batches of the base grid (fvcore), equal on all ranks.

    `batches` is of a baseline plan, so that groups are as in training; ranks' statistics are aggregated by their mean,
    and by the mean of variances plus the variance of means.
    """
    phase = batches.plan.phases[0]
    part = share(phase.slots[0].batch, phase.bn_groups, rank(), world_size())
    cuts = pieces(part, max_clips)
    group = neighbours(len(part.ranks))

    def inputs() -> Iterator[Tensor]:
        beat(0, steps, True)
        for done, batch in enumerate(loader.open(lambda step: batches(step)[part.start : part.stop], range(steps))):
            stop_if_asked()
            clips = batch.clips.to(precision.device, non_blocking=True)
            for piece in cuts:
                beat(done, steps, False)
                set_bn_groups(model, piece.groups, group)
                yield normalize(clips[piece.start : piece.stop])
            beat(done + 1, steps, True)

    model.train()
    with precision.autocast():
        update_bn_stats(model, inputs(), num_iters=steps * len(cuts))
    beat(steps, steps, True)  # which the last of the inputs, not asked for another, has not told
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]
    if world_size() == 1 or not layers:
        return
    means = torch.cat([layer.running_mean for layer in layers])  # type: ignore[misc]
    variances = torch.cat([layer.running_var for layer in layers])  # type: ignore[misc]
    mean = all_reduce(means.clone()) / world_size()
    variance = all_reduce(variances + (means - mean) ** 2) / world_size()
    sizes = [layer.num_features for layer in layers]
    for layer, m, v in zip(layers, mean.split(sizes), variance.split(sizes), strict=True):
        layer.running_mean.copy_(m)  # type: ignore[union-attr]
        layer.running_var.copy_(v)  # type: ignore[union-attr]
