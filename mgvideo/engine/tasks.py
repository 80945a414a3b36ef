"""Classification tasks: one class a video, or any number of classes. Each has its loss, scores and metrics."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Task(Protocol):
    """Computes the loss of logits and labels, and metrics of the scores of whole videos."""

    best: str  # the metric that selects the best checkpoint; higher is better
    reduce: str  # how to combine the scores of a video's views: "sum" (then divided by their number) or "max"

    def zero_labels(self, videos: int, classes: int) -> Tensor:
        """Return an all-zero label tensor for `videos` videos, to be filled in."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the losses of clips with logits `[n, classes]`, so that micro-batches add up."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return the scores `[n, classes]`, in 0–1, of single views."""

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Return metrics in percent from video scores `[videos, classes]`.

        A video that could not be read has NaN scores and counts as wrong.
        """


class SingleLabel:
    """One class a video: cross-entropy, softmax averaged over views, top-1 and top-5 accuracy."""

    best = "top1"
    reduce = "sum"

    def zero_labels(self, videos: int, classes: int) -> Tensor:
        """Return int64 zeros `[videos]`."""
        return torch.zeros(videos, dtype=torch.int64)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross-entropy; labels are int64 `[n]`."""
        return F.cross_entropy(logits, labels, reduction="sum")

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax over classes."""
        return logits.softmax(1)

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the top-1 and top-5 accuracy. With up to 5 classes, every video that was read is a top-5 hit."""
        top = scores.topk(min(5, scores.shape[1])).indices
        hits = (top == labels[:, None]) & ~scores.isnan().any(1, keepdim=True)
        return {"top1": 100 * hits[:, :1].any(1).float().mean().item(), "top5": 100 * hits.any(1).float().mean().item()}

    def confusion(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the counts `[true class, predicted class]`, without the videos that could not be read."""
        read = ~scores.isnan().any(1)
        classes = scores.shape[1]
        pairs = labels[read] * classes + scores[read].argmax(1)
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


class MultiLabel:
    """Any number of classes a video: binary cross-entropy, sigmoid, maximum over views, mAP."""

    best = "map"
    reduce = "max"

    def zero_labels(self, videos: int, classes: int) -> Tensor:
        """Return float32 zeros `[videos, classes]`."""
        return torch.zeros(videos, classes)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed binary cross-entropy, mean over classes; labels are float32 `[n, classes]`."""
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum()

    def scores(self, logits: Tensor) -> Tensor:
        """Return the sigmoid."""
        return logits.sigmoid()

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the mean average precision over the classes that have positives; 0 if no class has any.

        Leaves out videos without any label, as the official evaluation of Charades does.
        """
        from torchmetrics.functional.classification import binary_average_precision  # takes a second to import

        labelled = labels.any(1)
        scores, labels = scores[labelled].nan_to_num(0), labels[labelled].long()
        classes_with_positives = labels.any(0).nonzero().flatten().tolist()
        precisions = [binary_average_precision(scores[:, c], labels[:, c]).item() for c in classes_with_positives]
        return {"map": 100 * sum(precisions) / max(1, len(precisions))}


TASKS: dict[str, type[Task]] = {"single_label": SingleLabel, "multi_label": MultiLabel}
