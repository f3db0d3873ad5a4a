"""Figures in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Seconds for a reader: `8.3 s`, `9 min 42 s`, `12 min`, `3 h 05 min`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
