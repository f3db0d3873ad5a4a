"""Stacked bars in one PNG, with a line for the most there may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from latentray.reporting.curves import INK, LINES


def save(
    bars: Mapping[str, Mapping[str, float]],
    path: Path | str,
    *,
    title: str = "",
    y_label: str = "",
    limit: tuple[str, float] | None = None,
    dpi: int = 130,
) -> None:
    """Write one bar per entry, part upon part; `limit` is a name and a height. Raises ValueError for none."""
    if not bars:
        raise ValueError("no bars to draw")
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state

    with matplotlib.rc_context({"font.size": 9.0}):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=dpi)
        axes = figure.add_subplot()
        below = [0.0] * len(bars)
        parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
        for part, color in zip(parts, LINES * (len(parts) // len(LINES) + 1), strict=False):
            heights = [bar.get(part, 0.0) for bar in bars.values()]
            axes.bar(range(len(bars)), heights, 0.62, bottom=below, color=color, label=part)
            below = [base + height for base, height in zip(below, heights, strict=True)]
        for place, height in enumerate(below):
            axes.text(place, height, f"{height:,.1f}", ha="center", va="bottom", color=INK, fontsize=8)
        if limit is not None:
            axes.axhline(limit[1], color=INK, linewidth=1.0, linestyle="--", label=limit[0])
        axes.set_xticks(range(len(bars)), list(bars), fontsize=9)
        axes.set_title(title, color=INK, fontsize=10, loc="left")
        axes.set_ylabel(y_label, color=INK)
        axes.tick_params(colors=INK, length=3)
        axes.grid(True, axis="y", color=INK, alpha=0.18, linewidth=0.6)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path, format="png", facecolor="white")
