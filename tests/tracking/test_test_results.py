"""Files with the test's results by video and by class, and the picture of the confusion matrix."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from mgvideo.engine.tasks import MultiLabel, SingleLabel
from mgvideo.tracking.test_results import TestResults, draw_confusion, write_per_class, write_predictions

NAN = float("nan")
CLASSES = ["run", "jump; high", "swim"]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_each_video_has_a_row_with_its_best_classes(tmp_path: Path) -> None:
    scores = torch.tensor([[0.2, 0.7, 0.1], [NAN, NAN, NAN]])
    write_predictions(
        tmp_path / "p.csv", TestResults(["a,b.mp4", "bad\udcff.mp4"], CLASSES, scores, torch.tensor([0, 2]))
    )
    first, second = read_csv(tmp_path / "p.csv")
    assert (first["video"], first["label"]) == ("a,b.mp4", "run")
    assert [first[f"class_{i}"] for i in (1, 2, 3)] == ["jump; high", "run", "swim"]
    assert [float(first[f"score_{i}"]) for i in (1, 2, 3)] == pytest.approx([0.7, 0.2, 0.1])
    assert (second["video"], second["label"], second["class_1"]) == ("bad\udcff.mp4", "swim", "")


def test_each_class_has_a_row_with_its_accuracy_and_most_frequent_error(tmp_path: Path) -> None:
    scores = torch.tensor([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.1, 0.9, 0], [NAN, NAN, NAN], [0.3, 0.6, 0.1]])
    labels, task = torch.tensor([0, 0, 0, 0, 1]), SingleLabel()
    results = TestResults([f"{i}.mp4" for i in range(5)], CLASSES, scores, labels)
    write_per_class(tmp_path / "c.csv", *_values(task, results), task.confusion(scores, labels))
    run, jump, swim = read_csv(tmp_path / "c.csv")
    assert run == {
        "class": "run", "videos": "4", "top1": "25.00", "most_frequent_error": "jump; high", "errors": "2"
    }  # fmt: skip
    assert (jump["top1"], jump["errors"]) == ("100.00", "0")
    assert (swim["videos"], swim["top1"]) == ("0", "")


def test_a_multi_label_class_has_its_average_precision(tmp_path: Path) -> None:
    scores = torch.tensor([[0.9, 0.6, 0.5], [0.8, 0.7, 0.5]])
    labels, task = torch.tensor([[1.0, 1, 0], [0, 1, 0]]), MultiLabel()
    results = TestResults(["a.mp4", "b.mp4"], CLASSES, scores, labels)
    write_per_class(tmp_path / "c.csv", *_values(task, results), None)
    rows = read_csv(tmp_path / "c.csv")
    assert [(row["videos"], row["average_precision"]) for row in rows] == [("1", "100.00"), ("2", "100.00"), ("0", "")]
    write_predictions(tmp_path / "p.csv", results)
    assert read_csv(tmp_path / "p.csv")[0]["label"] == "run; jump; high"


def _values(task: SingleLabel | MultiLabel, results: TestResults) -> tuple[str, TestResults, torch.Tensor]:
    metric, values = task.per_class(results.scores, results.labels)
    return metric, results, values


@pytest.mark.parametrize("classes", [3, 120])
def test_the_confusion_matrix_is_drawn_with_a_readable_size(classes: int, tmp_path: Path) -> None:
    confusion = torch.eye(classes, dtype=torch.int64) * 3 + 1
    draw_confusion(tmp_path / "c.png", confusion, [f"class number {c}" for c in range(classes)])
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 300
        assert max(image.size) < 2500
        colours = image.convert("RGB").getcolors(10**6)
    assert colours is not None
    assert len(colours) > 50, "it is not blank"
