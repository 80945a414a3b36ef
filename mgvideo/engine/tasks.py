"""What a label is: one class of many, or any number of them. Loss, scores over views, and metrics for each."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Task(Protocol):
    """Logits and labels to a loss, and scores of whole videos to metrics."""

    best: str  # the metric that picks the best checkpoint, higher is better
    reduce: str  # how the scores of a video's views become one: "sum", then divided by their number, or "max"

    def no_labels(self, videos: int, classes: int) -> Tensor:
        """Labels of `videos` videos, to be filled in; no label is less than these."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over clips of logits `[n, classes]`, so that parts of a batch add up."""

    def scores(self, logits: Tensor) -> Tensor:
        """Scores `[n, classes]` in 0–1 of single views."""

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Metrics in percent of video scores `[videos, classes]`; a video that failed has NaN scores, and counts."""


class SingleLabel:
    """One class a video: cross-entropy, softmax averaged over views, top-1 and top-5."""

    best = "top1"
    reduce = "sum"

    def no_labels(self, videos: int, classes: int) -> Tensor:
        """int64 `[videos]`."""
        return torch.zeros(videos, dtype=torch.int64)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; labels int64 `[n]`."""
        return F.cross_entropy(logits, labels, reduction="sum")

    def scores(self, logits: Tensor) -> Tensor:
        """Softmax."""
        return logits.softmax(1)

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Top-1 and top-5 (top-k of fewer classes is everything)."""
        top = scores.topk(min(5, scores.shape[1])).indices
        hits = (top == labels[:, None]) & ~scores.isnan().any(1, keepdim=True)
        return {"top1": 100 * hits[:, :1].any(1).float().mean().item(), "top5": 100 * hits.any(1).float().mean().item()}

    def confusion(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Counts `[classes, classes]` of true by predicted class, failed videos left out."""
        read = ~scores.isnan().any(1)
        classes = scores.shape[1]
        pairs = labels[read] * classes + scores[read].argmax(1)
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


class MultiLabel:
    """Any number of classes a video: binary cross-entropy, sigmoid, maximum over views, mAP."""

    best = "map"
    reduce = "max"

    def no_labels(self, videos: int, classes: int) -> Tensor:
        """float32 `[videos, classes]`."""
        return torch.zeros(videos, classes)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, mean over classes; labels float32 `[n, classes]`."""
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()

    def scores(self, logits: Tensor) -> Tensor:
        """Sigmoid."""
        return logits.sigmoid()

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Mean average precision over the classes that have positives; 0 where none has.

        As the official evaluation of Charades, without the videos that have no label at all.
        """
        from torchmetrics.functional.classification import binary_average_precision  # takes a second to import

        told = labels.any(1)
        scores, labels = scores[told].nan_to_num(0), labels[told].long()
        present = labels.any(0).nonzero().flatten().tolist()
        precisions = [binary_average_precision(scores[:, c], labels[:, c]).item() for c in present]
        return {"map": 100 * sum(precisions) / max(1, len(precisions))}


TASKS: dict[str, type[Task]] = {"single_label": SingleLabel, "multi_label": MultiLabel}
