"""The random numbers of a run: hashes of (seed, stream, counters), so there is no generator state to save or share.

Each purpose has a stream of its own. A rank computes the numbers of its own clips alone, all of a step at once.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


class Stream(IntEnum):
    """What random numbers are for. Numbers are part of every run's results: never change or reuse one."""

    VIDEO_ORDER = 1
    CLIP_SEEDS = 2
    DROPOUT = 3
    PRECISE_BN = 4


def random_words(seed: int, stream: Stream, *counters: int | np.ndarray) -> np.ndarray:
    """Return a uint64 for each element of the counters, integers from 0 up that are broadcast together.

    Each word of the key goes through the SplitMix64 generator's finaliser (Steele, Lea and Flood 2014), which is a
    bijection: two values of the last counter never give the same number.
    """
    words = np.zeros(1, np.uint64)
    for word in (seed, stream, *counters):
        words = _mix(words + np.asarray(word).astype(np.uint64) + _GAMMA)
    return words


def random_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Return one 64-bit number, for a generator of another library."""
    return int(random_words(seed, stream, *counters)[0])


def _mix(words: np.ndarray) -> np.ndarray:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        words = (words ^ (words >> shift)) * multiplier
    return words ^ (words >> _SHIFTS[2])
