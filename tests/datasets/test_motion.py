"""Test Motion: deterministic files, and single frames without information about the class."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mgvideo.datasets.motion import CLASSES, Knobs, draw_frames, make_motion, motion
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.plan import Grid

SMALL = Knobs(train=16, val=8, frames=12, height=32, width=48)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_motion_is_created_once_and_deterministic(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        first, second = pool.map(make_motion, [str(tmp_path / "a")] * 2, [SMALL] * 2, [1, 2])
    assert first == second
    contents = files(first)
    assert contents == files(make_motion(str(tmp_path / "b"), SMALL, processes=1))
    assert sorted(contents) == sorted(
        ["classes.txt", "knobs.json", "train.csv", "val.csv"]
        + [f"train/{i:05d}.mp4" for i in range(16)]
        + [f"val/{i:05d}.mp4" for i in range(8)]
    )
    other = make_motion(str(tmp_path / "a"), Knobs(train=2, val=1, frames=4, height=32, width=48), processes=1)
    assert other != first
    assert files(first) == contents, "other knobs must leave the first dataset alone"


def test_motion_is_a_dataset(tmp_path: Path) -> None:
    make_motion(str(tmp_path), SMALL, processes=1)
    train, val = (motion(str(tmp_path), SMALL, split) for split in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (16, 8, list(CLASSES))
    assert train.labels.tolist() == [*range(8), *range(8)]
    sample = train[ClipRequest(9, Grid(4, 24, (2, 2), (24, 32)), seed=1)]
    assert (sample.clip.shape, sample.label.item()) == ((4, 24, 24, 3), 1)


def test_two_shapes_have_two_labels(tmp_path: Path) -> None:
    knobs = Knobs(train=8, val=1, frames=4, height=32, width=48, shapes=2)
    make_motion(str(tmp_path), knobs, processes=1)
    dataset = motion(str(tmp_path), knobs, "train")
    assert dataset.labels.sum(1).tolist() == [2] * 8
    assert dataset.labels.any(0).all()


def test_each_class_moves_like_its_name() -> None:
    """Compare the first frame, moved like each class, with the last frame."""
    knobs = Knobs(frames=9, height=64, width=96, colour=0, texture=(0, 0), sizes=(0.2, 0.3))
    for label, name in enumerate(CLASSES):
        votes = [_looks_like(list(draw_frames([label], knobs, np.random.default_rng((label, i))))) for i in range(12)]
        assert votes.count(label) > 6, f"{name}: {votes}"


def _looks_like(frames: list[np.ndarray]) -> int:
    """Return the class whose motion makes the first frame most similar to the last."""
    first, last = (frame.astype(float).mean(-1) for frame in (frames[0], frames[-1]))
    mask = abs(first - np.median(first)) > 10
    errors = [abs(_moved(first, mask, label) - last).mean() for label in range(8)]
    return int(np.argmin(errors))


def _moved(frame: np.ndarray, mask: np.ndarray, label: int) -> np.ndarray:
    """Move a frame like a class for eight frames at about the middle speed, with nearest-neighbour sampling."""
    h, w = frame.shape
    # the blob may wrap around the border, so its centre is the circular mean of its pixels
    rows, columns = np.nonzero(mask)
    cy, cx = (np.angle(np.exp(2j * np.pi * p / n).mean()) / (2 * np.pi) * n for p, n in ((rows, h), (columns, w)))
    y, x = np.mgrid[:h, :w].astype(float)
    dy, dx = (y - cy + h / 2) % h - h / 2, (x - cx + w / 2) % w - w / 2
    step = 8 * 0.014 * h
    shift = {0: (0, -step), 1: (0, step), 2: (-step, 0), 3: (step, 0)}.get(label, (0, 0))
    turn = {4: 1, 5: -1}.get(label, 0) * step / (0.25 * h)  # clockwise on a screen, where y points down
    grow = 1 + {6: 1, 7: -1}.get(label, 0) * 0.25 * step / (0.25 * h)
    dy, dx = dy - shift[0], dx - shift[1]
    dy, dx = (np.cos(turn) * dy - np.sin(turn) * dx) / grow, (np.sin(turn) * dy + np.cos(turn) * dx) / grow
    return frame[np.round(dy + cy).astype(int) % h, np.round(dx + cx).astype(int) % w]


def test_single_frames_do_not_reveal_the_class() -> None:
    """A ridge classifier on hand-made features of one frame stays near chance (12.5 %) on unseen videos."""
    knobs = Knobs(frames=12, height=32, width=48)
    rng = np.random.default_rng(0)
    labels = np.arange(1600) % 8
    frames = [next(islice(draw_frames([int(label)], knobs, rng), int(rng.integers(12)), None)) for label in labels]
    features = np.stack([_frame_features(frame) for frame in frames])
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    train, test = slice(0, 1200), slice(1200, None)
    gram = features[train].T @ features[train] + 30 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[train].T @ np.eye(8)[labels[train]])
    accuracy = ((features[test] @ weights).argmax(1) == labels[test]).mean()
    assert accuracy < 0.2, f"one frame tells the class in {accuracy:.0%} of cases"


def _frame_features(frame: np.ndarray) -> np.ndarray:
    """Return features: 8 × 12 brightness values of the frame and of the blob's mask; its area, spread, colours."""
    grey = frame.astype(float).mean(-1)
    mask = abs(grey - np.median(grey)) > 15
    grids = [a.reshape(8, 4, 12, 4).mean((1, 3)).ravel() for a in (grey, mask)]
    return np.concatenate([*grids, [mask.mean(), mask.mean() ** 2, grey.std()], frame.mean((0, 1))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (0.3, 0.6)}, "sizes must rise"),
        ({"width": 33}, "must be even"),
        ({"shapes": 0}, "shapes must be 1 to 8"),
        ({"train": 0}, "at least 1"),
    ],
)
def test_invalid_knobs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Knobs(**change)
