"""Classification tasks: one class a video, or any number of classes. Each has its loss, scores and metrics."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Task(Protocol):
    """Computes the loss of logits and labels, and metrics of the scores of whole videos."""

    best: str  # the metric that selects the best checkpoint; higher is better
    class_weights: Tensor | None  # float `[classes]`, factors of the loss; None: 1
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

    def per_class(self, scores: Tensor, labels: Tensor) -> tuple[str, Tensor]:
        """Return the name and the value `[classes]`, in percent, of the result of each class; NaN without videos."""

    def chance(self, labels: Tensor, classes: int) -> float:
        """Return the value of metric `best`, in percent, that guessing reaches."""


class SingleLabel:
    """One class a video: cross-entropy, softmax averaged over views, top-1 and top-5 accuracy.

    Args:
        class_weights: float `[classes]`, factors of the losses of clips of each class.
        label_smoothing: share of the label that is spread evenly over all classes.
    """

    best = "top1"
    reduce = "sum"

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        self.class_weights, self.label_smoothing = class_weights, label_smoothing

    def zero_labels(self, videos: int, classes: int) -> Tensor:
        """Return int64 zeros `[videos]`."""
        return torch.zeros(videos, dtype=torch.int64)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed cross-entropy; labels are int64 `[n]`, or probabilities `[n, classes]` of mixed clips."""
        self.class_weights = _like(self.class_weights, logits)
        labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
        return F.cross_entropy(
            logits, labels, self.class_weights, reduction="sum", label_smoothing=self.label_smoothing
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Return the softmax over classes."""
        return logits.softmax(1)

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the top-1 accuracy, and the top-5 accuracy if there are more than five classes."""
        classes = scores.shape[1]
        top = scores.topk(min(5, classes)).indices
        hits = (top == labels[:, None]) & ~scores.isnan().any(1, keepdim=True)
        metrics = {"top1": 100 * hits[:, :1].any(1).float().mean().item()}
        if classes > 5:
            metrics["top5"] = 100 * hits.any(1).float().mean().item()
        return metrics

    def per_class(self, scores: Tensor, labels: Tensor) -> tuple[str, Tensor]:
        """Return the top-1 accuracy of each class; a video that could not be read counts as wrong."""
        videos = labels.bincount(minlength=scores.shape[1])
        hits = self.confusion(scores, labels).diagonal()
        return "top1", 100 * hits.double() / videos  # 0 / 0 is NaN

    def chance(self, labels: Tensor, classes: int) -> float:
        """Return the top-1 accuracy of naming the most frequent class for every video."""
        return 100 * labels.bincount(minlength=classes).max().item() / max(1, len(labels))

    def confusion(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the counts `[true class, predicted class]`, without the videos that could not be read."""
        read = ~scores.isnan().any(1)
        classes = scores.shape[1]
        pairs = labels[read] * classes + scores[read].argmax(1)
        return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


class MultiLabel:
    """Any number of classes a video: binary cross-entropy, sigmoid, maximum over views, mAP.

    Args:
        class_weights: float `[classes]`, factors of the losses of each class.
    """

    best = "map"
    reduce = "max"

    def __init__(self, class_weights: Tensor | None = None) -> None:
        self.class_weights = class_weights

    def zero_labels(self, videos: int, classes: int) -> Tensor:
        """Return float32 zeros `[videos, classes]`."""
        return torch.zeros(videos, classes)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the summed binary cross-entropy, mean over classes; labels are float32 `[n, classes]`, in 0–1."""
        self.class_weights = _like(self.class_weights, logits)
        return F.binary_cross_entropy_with_logits(logits, labels, self.class_weights, reduction="none").mean(1).sum()

    def scores(self, logits: Tensor) -> Tensor:
        """Return the sigmoid."""
        return logits.sigmoid()

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the mean average precision over the classes that have positives; 0 if no class has any.

        Leaves out videos without any label, as the official evaluation of Charades does.
        """
        precisions = self.per_class(scores, labels)[1]
        precisions = precisions[~precisions.isnan()]
        return {"map": precisions.mean().item() if len(precisions) else 0.0}

    def per_class(self, scores: Tensor, labels: Tensor) -> tuple[str, Tensor]:
        """Return the average precision of each class, without the videos that have no label at all."""
        from torchmetrics.functional.classification import binary_average_precision  # takes a second to import

        labelled = labels.any(1)
        scores, labels = scores[labelled].nan_to_num(0), labels[labelled].long()
        precisions = torch.full((labels.shape[1],), float("nan"), dtype=torch.float64)
        for c in labels.any(0).nonzero().flatten().tolist():
            precisions[c] = 100 * binary_average_precision(scores[:, c], labels[:, c]).item()
        return "average_precision", precisions

    def chance(self, labels: Tensor, classes: int) -> float:
        """Return the mean average precision of random scores: the mean share of positives over classes with any."""
        labelled = labels[labels.any(1)]
        shares = labelled.float().mean(0) if len(labelled) else labelled.new_zeros(classes)
        shares = shares[shares > 0]
        return 100 * shares.mean().item() if len(shares) else 0.0


def _like(weights: Tensor | None, logits: Tensor) -> Tensor | None:
    """Move weights to the device and dtype of logits. It is done once, because the result replaces the weights."""
    return None if weights is None else weights.to(logits.device, logits.dtype)


TASKS: dict[str, type[Task]] = {"single_label": SingleLabel, "multi_label": MultiLabel}
