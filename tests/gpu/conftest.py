"""Tests of what only a GPU can show. `make test-gpu` runs them; all other tests hide GPUs.

`MGVIDEO_TEST_DEVICE=cpu` rehearses those that can run without a GPU: it shows that the tests work, and nothing of GPUs.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("MGVIDEO_TEST_DEVICE", "")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; the test is skipped where there is none."""
    if DEVICE == "cpu":
        return torch.device("cpu")
    if DEVICE != "cuda":
        pytest.skip("GPU tests run with `make test-gpu` only, on a machine with a GPU")
    if not torch.cuda.is_available():
        pytest.fail("make test-gpu: torch sees no GPU here; `python tools/doctor.py` says why")
    return torch.device("cuda", 0)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """A GPU, for tests that cannot be rehearsed on a CPU."""
    if device.type != "cuda":
        pytest.skip("this test cannot be rehearsed on a CPU")
    return device
