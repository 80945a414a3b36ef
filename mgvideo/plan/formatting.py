"""Text formats that tables, logs and reports share."""

from __future__ import annotations


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
