"""Results of the test by video and by class: predictions.csv, per_class.csv and a picture of the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from torch import Tensor

from mgvideo.storage.files import write_atomic, write_csv

TOP = 5  # classes of predictions.csv for each video
MAX_DRAWN_CLASSES = 40  # of the confusion matrix
MAX_CLASSES_WITH_NUMBERS = 15  # up to which the cells of the picture show their percentage


@dataclass(frozen=True)
class TestResults:
    """Scores of all tested videos.

    Attributes:
        paths: of the videos.
        class_names: names of the classes.
        scores: float `[videos, classes]` in 0–1, NaN for a video that could not be read.
        labels: int64 `[videos]`, or multi-hot `[videos, classes]`.
    """

    __test__ = False  # not a test, although pytest collects classes of such names

    paths: Sequence[str]
    class_names: Sequence[str]
    scores: Tensor
    labels: Tensor

    def label_names(self, video: int) -> str:
        """Return the names of a video's labels, separated by `; `."""
        label = self.labels[video]
        classes = label.nonzero().flatten().tolist() if label.ndim else [int(label)]
        return "; ".join(self.class_names[c] for c in classes)


def write_predictions(path: Path, results: TestResults) -> None:
    """Write a row for each video: path, label, and the classes with the highest scores, the best one first."""
    top = min(TOP, len(results.class_names))
    header = ["video", "label", *(name for i in range(1, top + 1) for name in (f"class_{i}", f"score_{i}"))]
    best = results.scores.nan_to_num(-1).topk(top)
    rows = []
    for video, video_path in enumerate(results.paths):
        could_be_read = not results.scores[video].isnan().any()
        row = [video_path, results.label_names(video)]
        for score, c in zip(best.values[video].tolist(), best.indices[video].tolist(), strict=True):
            row += [results.class_names[c], f"{score:.4f}"] if could_be_read else ["", ""]
        rows.append(row)
    write_csv(path, header, rows)


def write_per_class(path: Path, metric: str, results: TestResults, values: Tensor, confusion: Tensor | None) -> None:
    """Write a row for each class: its number of videos and its result, and what it was most often taken for.

    Args:
        path: the file.
        metric: name of the result.
        results: scores of the videos.
        values: the result `[classes]` in percent, NaN for a class without videos.
        confusion: counts `[true class, predicted class]`; None for multi-label tasks.
    """
    classes, labels = len(results.class_names), results.labels
    counts = labels.sum(0) if labels.ndim == 2 else labels.bincount(minlength=classes)
    header = ["class", "videos", metric]
    if confusion is not None:
        header += ["most_frequent_error", "errors"]
        mistakes = confusion.clone().fill_diagonal_(0)
    rows = []
    for c, name in enumerate(results.class_names):
        value = float(values[c])
        row = [name, str(int(counts[c])), "" if np.isnan(value) else f"{value:.2f}"]
        if confusion is not None:
            number, wrong = mistakes[c].max(0)
            row += [results.class_names[int(wrong)], str(int(number))] if number else ["", "0"]
        rows.append(row)
    write_csv(path, header, rows)


def draw_confusion(path: Path, confusion: Tensor, class_names: Sequence[str]) -> np.ndarray:
    """Draw the confusion matrix, counts `[true class, predicted class]`, as a PNG file with the names of the classes.

    With more than `MAX_DRAWN_CLASSES` classes, only those with the lowest accuracy are drawn.

    Returns:
        The picture, uint8 `[height, width, 3]`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import, for the end of a run
    from matplotlib.figure import Figure

    counts = confusion.double().numpy()
    percent = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    drawn = list(range(len(class_names)))
    title = "Predictions of the videos of each class, %"
    if len(drawn) > MAX_DRAWN_CLASSES:
        tested = [c for c in drawn if counts[c].sum()]
        drawn = sorted(sorted(tested, key=lambda c: percent[c, c])[:MAX_DRAWN_CLASSES])
        title += f": the {len(drawn)} classes with the lowest accuracy"
    names = [class_names[c][:40] for c in drawn]
    cells = percent[np.ix_(drawn, drawn)]
    side = 2.5 + max(2.0, 0.3 * len(drawn))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=10, loc="left")
    if len(names) <= MAX_CLASSES_WITH_NUMBERS:
        for (row, column), value in np.ndenumerate(cells):
            colour = "white" if value > 60 else "#333333"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, shrink=0.6)
    canvas, png = FigureCanvasAgg(figure), BytesIO()
    figure.savefig(png, format="png")
    write_atomic(path, png.getvalue())
    return np.asarray(canvas.buffer_rgba())[..., :3]
