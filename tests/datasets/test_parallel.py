"""Test parallel_map: the error if processes cannot be started."""

from __future__ import annotations

import resource

import pytest

from mgvideo.datasets.parallel import parallel_map
from mgvideo.errors import UserError


def test_processes_that_cannot_start_raise_user_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file can grow, as if /dev/shm were full
    try:
        with pytest.raises(UserError, match=r"cannot start 2 processes: File too large; set a smaller processes="):
            next(parallel_map(str, range(5_000_000), 2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
