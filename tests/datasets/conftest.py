"""Shared fixtures of the dataset tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from videos import write_video


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Kinetics-style dataset: six videos of three classes, `list.csv` and `classes.txt`."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write_video(folder / f"clips/video {i}.mp4", frames=30 + 10 * i)
    (folder / "list.csv").write_text("".join(f"clips/video {i}.mp4 {i % 3}\n" for i in range(6)))
    (folder / "classes.txt").write_text("walk\nrun\njump high\n")
    return folder
