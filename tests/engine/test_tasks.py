"""Metrics of tasks against values computed by hand, and how an evaluation combines the views of a video."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training import KNOBS

from mgvideo.datasets.decoders import PyAV
from mgvideo.datasets.motion import motion
from mgvideo.datasets.video import VideoDataset
from mgvideo.engine.evaluation import Evaluator, Views
from mgvideo.engine.precision import Normalize, choose_precision
from mgvideo.engine.tasks import MultiLabel, SingleLabel, Task
from mgvideo.loading.loader import Loader, LoaderOptions
from mgvideo.loading.requests import ClipRequest, DecodeFailure, Sample, View
from mgvideo.models.small import r2plus1d_small
from mgvideo.plan.plan import Grid

NAN = float("nan")


def test_average_precision_equals_that_of_the_official_evaluation_of_charades() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.7, 0.6, 0.5], [0.6, 0.9, 0.5], [0.95, 0.95, 0.5]])
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    # without the last video, which has no label; the third class, which no video has, is left out
    first, second = (1 / 1 + 2 / 3) / 2, (1 / 1 + 2 / 2) / 2
    assert MultiLabel().metrics(scores, labels)["map"] == pytest.approx(100 * (first + second) / 2)
    missing = scores.clone()
    missing[0] = NAN  # a video that could not be read counts, with the lowest scores
    assert MultiLabel().metrics(missing, labels)["map"] == pytest.approx(100 * ((1 / 2 + 2 / 4) / 2 + second) / 2)
    assert MultiLabel().metrics(scores[:, :1], labels[:, :1])["map"] == pytest.approx(100.0)
    assert MultiLabel().metrics(scores, torch.zeros_like(labels))["map"] == 0


def test_a_video_that_could_not_be_read_counts_as_wrong() -> None:
    scores = torch.tensor([[0.7, 0.3], [0.6, 0.4], [NAN, NAN]])
    assert SingleLabel().metrics(scores, torch.tensor([0, 1, 0]))["top1"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("task", [SingleLabel(), MultiLabel()])
def test_scores_of_a_video_are_the_mean_or_the_maximum_over_its_views(motion_root: str, task: Task) -> None:
    multi = isinstance(task, MultiLabel)
    dataset = motion(motion_root, replace(KNOBS, shapes=2 if multi else 1), "val", PyAV())
    torch.manual_seed(0)
    model = r2plus1d_small(8, width=4).eval()
    normalize = Normalize((0.45,) * 3, (0.225,) * 3)
    precision = choose_precision("fp32", torch.device("cpu"))
    evaluate = Evaluator(Loader(dataset, LoaderOptions(num_workers=0)), task, 8, normalize, precision, batch_size=3)
    grid = Grid(4, 32, (2, 2), (40, 40))
    result = evaluate(model, Views(grid, num_clips=2, num_crops=3))
    assert not result.failures
    for index in range(len(dataset)):
        samples = [dataset[ClipRequest(index, grid, 0, View(clip, 2, 3))] for clip in range(2)]
        with torch.no_grad():
            logits = model(normalize(torch.cat([sample.clip for sample in samples])))
        expected = logits.sigmoid().amax(0) if multi else logits.softmax(1).mean(0)
        torch.testing.assert_close(result.scores[index], expected)
        assert torch.equal(result.labels[index], samples[0].label)


class Unreadable:
    """A dataset of two videos of which the second cannot be read, for a different reason in each view."""

    def __init__(self, dataset: VideoDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 2

    def __getitem__(self, request: ClipRequest) -> Sample:
        sample = self.dataset[request]
        if request.index == 0 or request.view is None:
            return sample
        return replace(sample, failures=(DecodeFailure(1, self.dataset.path(1), f"damage {request.view.clip}"),))


def test_a_video_that_fails_for_several_reasons_is_one_failure(motion_root: str) -> None:
    dataset = Unreadable(motion(motion_root, KNOBS, "val", PyAV()))
    evaluate = Evaluator(
        Loader(dataset, LoaderOptions(num_workers=0)), SingleLabel(), 8, Normalize((0.45,) * 3, (0.225,) * 3),
        choose_precision("fp32", torch.device("cpu")),
    )  # fmt: skip
    result = evaluate(r2plus1d_small(8, width=4).eval(), Views(Grid(4, 32, (2, 2), (40, 40)), num_clips=3, num_crops=1))
    assert [(failure.index, failure.reason) for failure in result.failures] == [(1, "damage 0")]
    assert result.scores.isnan().all(1).tolist() == [False, True]


def test_class_weights_and_smoothing_are_the_same_for_classes_and_for_shares_of_them() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, weights = torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([1.0, 2.0, 0.5, 0.0])
    task = SingleLabel(weights, label_smoothing=0.1)
    loss = task.loss(logits, labels)
    soft = torch.nn.functional.one_hot(labels, 4).float()
    torch.testing.assert_close(task.loss(logits, soft), loss)
    target = soft.double() * 0.9 + 0.1 / 4
    expected = -(weights.double() * target * logits.log_softmax(1)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(task.loss(logits[:2], labels[:2]) + task.loss(logits[2:], labels[2:]), loss)
    mixed = (SingleLabel().loss(logits[:1], labels[:1]) + 3 * SingleLabel().loss(logits[:1], labels[1:2])) / 4
    torch.testing.assert_close(SingleLabel().loss(logits[:1], 0.25 * soft[:1] + 0.75 * soft[1:2]), mixed)


def test_class_weights_of_several_classes_a_video_scale_the_loss_of_each_class() -> None:
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    first, second = (MultiLabel().loss(logits[:, [i]], labels[:, [i]]) for i in range(2))
    weighted = MultiLabel(torch.tensor([3.0, 0.5])).loss(logits, labels)
    torch.testing.assert_close(weighted, (3 * first + 0.5 * second) / 2)
