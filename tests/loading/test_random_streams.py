"""Random streams: published values, independence and broadcasting."""

import numpy as np

from mgvideo.loading.random_streams import Stream, random_seed, random_words


def splitmix64(state: int) -> int:
    """Return the output of the published generator for a state that is already advanced, with Python's integers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_random_words_equal_splitmix64() -> None:
    gamma = 0x9E3779B97F4A7C15
    assert splitmix64(gamma) == 0xE220A8397B1DCDAF  # the reference implementation's first output for seed 0
    for seed in (0, 1, 2**64 - 1):
        words = random_words(seed, Stream.CLIP_SEEDS, np.arange(10**9, 10**9 + 5))
        key = splitmix64((splitmix64((seed + gamma) % 2**64) + Stream.CLIP_SEEDS + gamma) % 2**64)
        assert words.tolist() == [splitmix64((key + counter + gamma) % 2**64) for counter in range(10**9, 10**9 + 5)]


def test_each_stream_seed_and_counter_gives_another_random_number() -> None:
    counters = np.arange(1000)
    words = [random_words(seed, stream, counters) for seed in (0, 1) for stream in Stream]
    words += [random_words(0, Stream.VIDEO_ORDER, 1, counters), random_words(0, Stream.VIDEO_ORDER, counters, 1)]
    # the last two arrays share the pair of counters (1, 1), all other words are distinct
    assert len(np.unique(np.concatenate(words))) == 1000 * len(words) - 1


def test_counters_are_broadcast() -> None:
    table = random_words(7, Stream.VIDEO_ORDER, np.arange(3)[:, None], np.arange(4))
    assert table.shape == (3, 4)
    assert table[2, 3] == random_seed(7, Stream.VIDEO_ORDER, 2, 3)
