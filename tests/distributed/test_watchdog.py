"""Ranks that watch each other through a store, without processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from mgvideo.distributed import watchdog as module
from mgvideo.distributed.watchdog import RankError, Watchdog, report_position


@pytest.fixture
def store() -> Iterator[dist.Store]:
    yield dist.HashStore()
    report_position("before the first step")


@pytest.mark.parametrize("there_for", [1, 9])
def test_a_rank_that_is_behind_has_its_own_limit(store: dist.Store, there_for: int) -> None:
    told = [1, "waiting for a batch", (3, 0), 5.0, there_for]  # looks, place, order, its limit, looks at that place
    store.set("watch/rank1", json.dumps(told))
    report_position("backward", (3, 2), 1.0)
    watch = Watchdog(store, 0, 2)
    watch.start()
    while watch.failure is None and json.loads(store.get("watch/rank0"))[0] < 4:  # its own looks
        time.sleep(0.05)
    failure = watch.failure
    watch.stop(failed=False)
    if there_for <= 5:
        assert failure is None, "it has only just come there"
    else:
        assert failure is not None
        assert str(failure) == (
            "rank 1 failed first, waiting for a batch: it hangs: nothing has happened for 5 s (hang_timeout)"
        )


class SlowStore(dist.Store):
    """A store whose answers take their time, as on a machine with too much to do."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self.store = store

    def set(self, key: str, value: str) -> None:
        time.sleep(3)
        self.store.set(key, value)

    def get(self, key: str) -> bytes:
        return self.store.get(key)

    def check(self, keys: list[str]) -> bool:
        return self.store.check(keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        return self.store.compare_set(key, expected, desired)


def test_a_killed_rank_is_found_however_slow_the_looks(store: dist.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUSPECT", 1)
    store.set("watch/rank1", json.dumps([1, "backward", (3, 2), 60.0, 1]))
    slow = SlowStore(store)  # torch keeps no reference to it
    watch = Watchdog(slow, 0, 2)
    watch.start()
    explained = watch.explain(RuntimeError("gloo: Connection reset by peer"))
    watch.stop(failed=False)
    assert isinstance(explained, RankError)
    assert "rank 1 failed first, backward: it is gone without a word" in str(explained)
