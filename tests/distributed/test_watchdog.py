"""Watchdogs of several ranks, on an in-process store without processes."""

from __future__ import annotations

import json
import time

import pytest
import torch.distributed as dist

from mgvideo.distributed import watchdog as module
from mgvideo.distributed.watchdog import Position, RankError, Watchdog


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


@pytest.mark.parametrize("heartbeats", [1, 9])
def test_a_rank_that_is_behind_is_judged_by_its_own_limit(store: dist.Store, heartbeats: int) -> None:
    # number of the heartbeat, position, order, limit, heartbeats at this position
    heartbeat = [1, "waiting for a batch", (3, 0), 5.0, heartbeats]
    store.set("watchdog/rank1", json.dumps(heartbeat))
    position = Position()
    position.report("backward", (3, 2), 1.0)
    watchdog = Watchdog(store, 0, 2, position)
    watchdog.start()
    while watchdog.failure is None and json.loads(store.get("watchdog/rank0"))[0] < 4:  # rank 0's fourth heartbeat
        time.sleep(0.05)
    failure = watchdog.failure
    watchdog.stop(failed=False)
    if heartbeats <= 5:
        assert failure is None, "rank 1 is within its limit"
    else:
        assert failure is not None
        assert str(failure) == (
            "rank 1 failed first, waiting for a batch: it hangs: nothing has happened for 5 s (hang_timeout)"
        )


class SlowStore(dist.Store):
    """A store that takes 3 s for each write, as on an overloaded machine."""

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


def test_a_killed_rank_is_detected_even_with_slow_heartbeats(
    store: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SILENT_HEARTBEATS_AFTER_FAILURE", 1)
    store.set("watchdog/rank1", json.dumps([1, "backward", (3, 2), 60.0, 1]))
    slow = SlowStore(store)  # keep a reference: torch keeps none
    watchdog = Watchdog(slow, 0, 2, Position())
    watchdog.start()
    explained = watchdog.explain(RuntimeError("gloo: Connection reset by peer"))
    watchdog.stop(failed=False)
    assert isinstance(explained, RankError)
    assert "rank 1 failed first, backward: it stopped sending heartbeats" in str(explained)
