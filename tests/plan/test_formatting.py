"""Durations, sizes and lists in messages."""

from __future__ import annotations

from mgvideo.plan.formatting import format_duration, format_memory, shorten


def test_durations_have_two_units_at_most() -> None:
    assert [format_duration(seconds) for seconds in (0.4, 47, 200, 18180, 187200)] == [
        "0 s", "47 s", "3:20 min", "5:03 h", "2 d 4 h",
    ]  # fmt: skip


def test_memory_is_in_binary_units() -> None:
    assert [format_memory(size) for size in (0, 2**20 + 1, 680 * 2**20, 1.25 * 2**30)] == [
        "0 MiB", "2 MiB", "680 MiB", "1.2 GiB",
    ]  # fmt: skip


def test_long_lists_are_shortened() -> None:
    assert shorten("abc") == "a, b, c"
    assert shorten("abcdefg") == "a, b, c, d, e, and 2 more"
    assert shorten("abc", 1, "; ") == "a; and 2 more"
