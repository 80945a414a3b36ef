"""Fixtures that all tests share."""

from __future__ import annotations

import os

if os.environ.get("MGVIDEO_TEST_DEVICE") != "cuda":  # tests/gpu; all other tests run the same code on every machine
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, and for the processes that tests start

import pytest
from training import KNOBS

from mgvideo.datasets.motion import make_motion


@pytest.fixture(scope="session")
def motion_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the small Motion dataset of `training.KNOBS` in it."""
    root = tmp_path_factory.mktemp("motion")
    make_motion(str(root), KNOBS, processes=1)  # others would take longer to start than this takes
    return str(root)
