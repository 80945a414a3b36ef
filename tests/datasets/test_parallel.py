"""Processes that work on many files: what is said where they cannot be started."""

from __future__ import annotations

import resource

import pytest

from mgvideo.datasets.parallel import parallel_map
from mgvideo.errors import UserError


def test_processes_that_cannot_be_started_are_no_fault_of_an_output() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file may grow, as where /dev/shm is full
    try:
        with pytest.raises(UserError, match=r"cannot start 2 processes: File too large; give fewer with processes="):
            next(parallel_map(str, range(5_000_000), 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
