"""Tests that require a GPU. `make test-gpu` runs them; all other tests hide GPUs.

With `MGVIDEO_TEST_DEVICE=cpu`, those that can run on the CPU do so, to check the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("MGVIDEO_TEST_DEVICE", "")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU in a rehearsal. Without `MGVIDEO_TEST_DEVICE` the test is skipped."""
    if DEVICE == "cpu":
        return torch.device("cpu")
    if DEVICE != "cuda":
        pytest.skip("run GPU tests with `make test-gpu` on a machine with a GPU")
    if not torch.cuda.is_available():
        pytest.fail("make test-gpu: torch does not see a GPU; run `python tools/doctor.py` for the reason")
    return torch.device("cuda", 0)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """A GPU, for tests that cannot run on the CPU."""
    if device.type != "cuda":
        pytest.skip("this test cannot run on the CPU")
    return device
