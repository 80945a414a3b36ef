"""Fixtures that all tests share."""

from __future__ import annotations

import os
import signal

# Only tests/gpu use a GPU, so that all other tests run the same code everywhere. The variable is set before torch is
# imported, and inherited by the processes that tests start.
if os.environ.get("MGVIDEO_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from training import KNOBS

from mgvideo.cpu.resources import available_cpus
from mgvideo.datasets.motion import make_motion

# A shell that starts a job in the background ignores SIGINT in it; programs that tests start must not inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the workers of `pytest -n auto`: one more than CPUs, because many tests wait for processes."""
    return len(available_cpus()) + 1


@pytest.fixture(scope="session")
def motion_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that contains the small Motion dataset of `training.KNOBS`."""
    root = tmp_path_factory.mktemp("motion")
    make_motion(str(root), KNOBS, processes=1)  # starting more processes takes longer than this
    return str(root)
