"""Text formats that tables, logs and reports share."""

from __future__ import annotations

import math
from collections.abc import Iterable

MAX_WORDS = 5  # in one message: class names, file names, differences


def format_duration(seconds: float) -> str:
    """Format a duration for people: 47 s, 3:20 min, 5:03 h, 2 d 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    total_minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(total_minutes, 60)
    if total_minutes < 100:
        return f"{total_minutes}:{s:02d} min"
    if hours < 48:
        return f"{hours}:{minutes:02d} h"
    return f"{hours // 24} d {hours % 24} h"


def format_memory(num_bytes: float) -> str:
    """Format a size of memory in binary units, as Docker and SLURM count it: 680 MiB, 1.3 GiB. Rounds MiB up."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{math.ceil(num_bytes / 2**20)} MiB"


def shorten(words: Iterable[str], shown: int = MAX_WORDS, separator: str = ", ") -> str:
    """Join the first `shown` words and add the number of the others."""
    words = list(words)
    more = [f"and {len(words) - shown} more"] if len(words) > shown else []
    return separator.join([*words[:shown], *more])
