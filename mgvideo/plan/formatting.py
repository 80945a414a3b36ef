"""Text formats shared by tables, logs and reports."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Format seconds for people: 47 s, 3:20 min, 5:03 h, 2 d 4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if minutes < 100:
        return f"{minutes}:{s:02d} min"
    if hours < 48:
        return f"{hours}:{minutes_left:02d} h"
    return f"{hours // 24} d {hours % 24} h"
