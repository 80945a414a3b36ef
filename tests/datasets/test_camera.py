"""Test Camera: deterministic files, motions that fit their names, and single frames that do not show the class."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from mgvideo.datasets import camera as camera_module
from mgvideo.datasets.camera import CLASSES, PHOTOGRAPHS, Knobs, camera, draw_frames, draw_video, make_camera
from mgvideo.errors import UserError
from mgvideo.loading.requests import ClipRequest
from mgvideo.plan.plan import Grid

SMALL = Knobs(train=24, val=12, frames=12, height=32, width=48)


def test_camera_is_a_dataset_and_deterministic(tmp_path: Path) -> None:
    first, second = (make_camera(str(tmp_path / name), SMALL, processes=1) for name in "ab")
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*.mp4"))
    assert len(names) == 36
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    train, val = (camera(str(tmp_path / "a"), SMALL, split) for split in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (24, 12, list(CLASSES))
    assert train.labels.tolist() == [*range(12), *range(12)]
    sample = train[ClipRequest(14, Grid(4, 24, (2, 2), (24, 32)), seed=1)]
    assert (sample.clip.shape, sample.label.item()) == ((4, 24, 24, 3), 2)


def test_training_and_validation_show_different_photographs() -> None:
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])
    frames = {split: next(draw_video(SMALL, split, 0).frames) for split in PHOTOGRAPHS}
    assert (frames["train"] != frames["val"]).any()


def test_each_class_moves_like_its_name() -> None:
    """Move the first frame as a class says, and compare it with a later one; the content moves against the camera."""
    knobs = Knobs(frames=9, height=64, width=64, views=(0.3, 0.9), speeds=(0.01, 0.0101), cuts=0)
    for label in range(8):
        votes = [_looks_like(label, knobs, seed) for seed in range(12)]
        known = [vote for vote in votes if vote is not None]
        assert len(known) > 6
        assert known.count(label) >= 0.7 * len(known), f"{CLASSES[label]}: {votes}"


def _looks_like(label: int, knobs: Knobs, seed: int) -> int | None:
    """Return the class whose motion makes frame 0 most similar to frame 6; None if there is a cut between them."""
    rng = np.random.default_rng((label, seed))
    if camera_module._camera_path(label, knobs, np.random.default_rng((label, seed)))[4][:7].any():
        return None
    frames = [frame.astype(float).mean(-1) for frame in islice(draw_frames(label, knobs, "val", rng), 7)]
    inner = np.s_[16:48, 16:48]
    errors = [abs(_moved(frames[0], motion) - frames[6])[inner].mean() for motion in MOTIONS]
    return int(np.argmin(errors))


def _shift(right: float, down: float) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    return lambda x, y: (x - right, y - down)


def _scale(factor: float) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    return lambda x, y: (x / factor, y / factor)


def _turn(angle: float) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Turn the content clockwise on the screen, where y points down."""
    return lambda x, y: (np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x)


TRAVEL = 0.06 * 64  # of six frames, in pixels
MOTIONS = [
    _shift(TRAVEL, 0), _shift(-TRAVEL, 0), _shift(0, TRAVEL), _shift(0, -TRAVEL),
    _scale(np.exp(0.06)), _scale(np.exp(-0.06)), _turn(-0.09), _turn(0.09),
]  # fmt: skip


def _moved(frame: np.ndarray, motion: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Move a frame, interpolated linearly; pixels from outside are those of the edge."""
    size = len(frame)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    x, y = (np.clip(a + (size - 1) / 2, 0, size - 1.001) for a in motion(x, y))
    left, top = x.astype(int), y.astype(int)
    fx, fy = x - left, y - top
    upper = frame[top, left] * (1 - fx) + frame[top, left + 1] * fx
    lower = frame[top + 1, left] * (1 - fx) + frame[top + 1, left + 1] * fx
    return upper * (1 - fy) + lower * fy


def test_to_and_fro_returns() -> None:
    """After a whole period the frame is the first one again; half a period after it, another."""
    knobs = Knobs(frames=21, height=32, width=32, cuts=0, turns=(10, 10), speeds=(0.02, 0.021))
    for label in range(8, 12):
        seed = next(s for s in range(99) if not _path(label, knobs, s)[4].any())
        frames = np.stack(list(draw_frames(label, knobs, "val", np.random.default_rng((label, seed))))).astype(float)
        assert abs(frames[20] - frames[0]).mean() < 1
        assert abs(frames[5] - frames[0]).mean() + abs(frames[10] - frames[0]).mean() > 3


def _path(label: int, knobs: Knobs, seed: int) -> tuple[np.ndarray, ...]:
    return camera_module._camera_path(label, knobs, np.random.default_rng((label, seed)))


def test_cuts_do_not_tell_the_class() -> None:
    knobs = Knobs()
    cuts = [np.mean([_path(label, knobs, seed)[4].sum() for seed in range(400)]) for label in range(12)]
    assert max(cuts) - min(cuts) < 0.3
    assert min(cuts) > 0.5


def test_single_frames_do_not_reveal_the_class() -> None:
    """A ridge classifier on features of one frame stays near chance (8.3 %) on other videos of the same photographs."""
    knobs = Knobs(frames=12, height=32, width=48)
    rng = np.random.default_rng(0)
    labels = np.arange(1920) % 12
    frames = [next(islice(draw_frames(int(c), knobs, "train", rng), int(rng.integers(12)), None)) for c in labels]
    features = np.stack([_frame_features(frame) for frame in frames])
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    train, test = slice(0, 1440), slice(1440, None)
    gram = features[train].T @ features[train] + 30 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[train].T @ np.eye(12)[labels[train]])
    accuracy = ((features[test] @ weights).argmax(1) == labels[test]).mean()
    assert accuracy < 0.14, f"one frame tells the class in {accuracy:.0%} of cases"


def _frame_features(frame: np.ndarray) -> np.ndarray:
    """Return features: 8 × 12 brightness values, their gradients' strengths and orientations, and colours."""
    grey = frame.astype(float).mean(-1)
    down, right = np.gradient(grey)
    grids = [a.reshape(8, 4, 12, 4).mean((1, 3)).ravel() for a in (grey, np.hypot(down, right))]
    angles = np.histogram(np.arctan2(down, right), 16, weights=np.hypot(down, right))[0]
    return np.concatenate([*grids, angles, [grey.std()], frame.mean((0, 1))])


def test_missing_photographs_give_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-image is not installed: run pip install 'mgvideo\[camera\]'"):
        make_camera(str(tmp_path), SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": (0.5, 1.5)}, "views must rise"),
        ({"height": 33}, "must be even"),
        ({"val": 0}, "at least 1"),
        ({"turns": (0, 4)}, "at least 1"),
    ],
)
def test_invalid_knobs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Knobs(**change)
