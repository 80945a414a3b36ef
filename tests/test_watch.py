"""Ranks that watch each other through a store, without processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from mgvideo.watch import Watch, at


@pytest.fixture
def store() -> Iterator[dist.Store]:
    yield dist.HashStore()
    at("before the first step")


@pytest.mark.parametrize("there_for", [1, 9])
def test_a_rank_that_is_behind_has_its_own_limit(store: dist.Store, there_for: int) -> None:
    told = [1, "waiting for a batch", (3, 0), 5.0, there_for]  # looks, place, order, its limit, looks at that place
    store.set("watch/rank1", json.dumps(told))
    at("backward", (3, 2), 1.0)
    watch = Watch(store, 0, 2)
    watch.start()
    time.sleep(3.5)
    failure = watch.failure
    watch.stop(failed=False)
    if there_for <= 5:
        assert failure is None, "it has only just come there"
    else:
        assert failure is not None
        assert str(failure) == (
            "rank 1 failed first, waiting for a batch: it hangs: nothing has happened for 5 s (hang_timeout)"
        )
