"""Loss curves as SVG, from the lines of `metrics.jsonl`: faint raw values under a smoothed line.

The colours are mid-tones on no background, so the picture reads on a light and on a dark page.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LINES = ("#3b82c4", "#d9772b", "#2f9e73", "#b05cc2", "#c2495a", "#8a7a2c")
INK = "#7d8590"


def parse(text: str) -> list[dict[str, Any]]:
    """The records in `metrics.jsonl`; a half line, left by a process that was killed, is passed over."""
    records: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "samples" in record:
            records.append(record)
    return records


def series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples and finite values, float64 of equal length, of one metric in order of samples."""
    points: list[tuple[float, float]] = []
    for record in records:
        try:
            point = (float(record["samples"]), float(record[name]))
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(point[1]):
            points.append(point)
    points.sort(key=lambda point: point[0])
    array = np.array(points, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smoothed(values: np.ndarray, window: float) -> np.ndarray:
    """Gaussian mean over about `window` points, centred so that it does not lag; at the ends over those there are."""
    sigma = max(window, 1e-6) / 2
    radius = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    inside = slice(radius, radius + len(values))
    return np.convolve(values, kernel)[inside] / np.convolve(np.ones(len(values)), kernel)[inside]


def curve(
    records: Sequence[Mapping[str, Any]],
    names: Sequence[str] | Mapping[str, str],
    *,
    title: str = "",
    y_label: str = "",
    log_y: bool = False,
    smooth: float = 0.05,
    width: float = 5.4,
    height: float = 2.9,
) -> str:
    """One SVG with a line per metric over samples seen; metrics without values are left out.

    Args:
        names: metrics; as a mapping, metric -> label in the legend.
        smooth: the smoothing window as a share of the points; 0 draws the raw values only.
        width, height: inches, of 72 SVG points.
    """
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, safe in a thread of a worker
    from matplotlib.ticker import EngFormatter, FuncFormatter

    labels = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    style = {"svg.fonttype": "none", "svg.hashsalt": "latentray", "font.family": "sans-serif", "font.size": 9.0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        drawn = 0
        for (name, label), color in zip(labels.items(), LINES * (len(labels) // len(LINES) + 1), strict=False):
            x, y = series(records, name)
            if log_y:
                x, y = x[y > 0], y[y > 0]
            if len(x) == 0:
                continue
            drawn += 1
            window = smooth * len(x)
            if window > 1.5:
                axes.plot(x, y, color=color, alpha=0.28, linewidth=0.8)
                axes.plot(x, smoothed(y, window), color=color, linewidth=1.7, label=label)
            else:
                axes.plot(
                    x, y, color=color, linewidth=1.7, label=label, marker="o" if len(x) < 12 else "", markersize=3
                )
        if log_y and drawn:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: _minor(value) if high / low < 30 else ""))
        if not drawn:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=INK, transform=axes.transAxes)
            axes.set_xticks([])
            axes.set_yticks([])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("samples", color=INK)
        axes.set_ylabel(y_label, color=INK)
        axes.set_title(title, color=INK, fontsize=10, loc="left")
        axes.tick_params(which="both", colors=INK, length=3)
        axes.grid(True, color=INK, alpha=0.18, linewidth=0.6)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        if drawn > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": "latentray"})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prolog and DOCTYPE, which name a foreign host


def _minor(value: float) -> str:
    """Between two powers of ten only 2 and 5 are labelled."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""
