"""The random numbers of a run: hashes of (seed, stream, counters). There is no generator state to save or share.

Each purpose has its own stream. A rank computes only the numbers of its own clips, all of a step in one call.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


class Stream(IntEnum):
    """The purpose of random numbers. The values determine the results of runs: never change or reuse one."""

    VIDEO_ORDER = 1
    CLIP_SEEDS = 2
    DROPOUT = 3
    PRECISE_BN = 4
    AUGMENTATION = 5
    ERASING = 6
    MIXING = 7
    CROP = 8
    CLASS_ORDER = 9
    VIDEOS_OF_CLASS = 10


def random_words(seed: int, stream: Stream, *counters: int | np.ndarray) -> np.ndarray:
    """Return a uint64 array with one random word for each element of the counters.

    The counters are non-negative integers or integer arrays, broadcast together. Each word of the key (seed, stream,
    counters) goes through the finaliser of the SplitMix64 generator (Steele, Lea and Flood 2014). It is a bijection,
    so two values of the last counter never give the same word.
    """
    words = np.zeros(1, np.uint64)
    for word in (seed, stream, *counters):
        words = _mix(words + np.asarray(word).astype(np.uint64) + _GAMMA)
    return words


def random_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Return one 64-bit number to seed a generator of another library."""
    return int(random_words(seed, stream, *counters)[0])


def _mix(words: np.ndarray) -> np.ndarray:
    """Apply the finaliser of SplitMix64."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        words = (words ^ (words >> shift)) * multiplier
    return words ^ (words >> _SHIFTS[2])
