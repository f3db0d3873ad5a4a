"""Ways through a plane scene, in one PNG: those that succeeded and those that did not, around what stands there."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from latentray.reporting.curves import INK, LINES

_GOOD, _BAD = LINES[2], LINES[4]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One scene in the unit square, y up, and the ways through it."""

    title: str
    wall: tuple[float, float, float]
    """Its x, the middle of its gap and the gap's half width."""
    disc: tuple[float, float, float]
    """Middle and radius of the obstacle."""
    goal: tuple[float, float, float]
    """Middle and radius."""
    paths: Sequence[np.ndarray]
    """Each (T, 2)."""
    succeeded: Sequence[bool]
    """Of each way."""


def picture(panels: Sequence[Panel], *, columns: int = 4, dpi: int = 110) -> Image.Image:
    """The panels, left to right and top to bottom. Raises ValueError for none."""
    if not panels:
        raise ValueError("no panels to draw")
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state
    from matplotlib.patches import Circle

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context({"font.size": 9.0}):
        figure = Figure(figsize=(2.7 * columns, 2.9 * rows), layout="constrained", dpi=dpi)
        for place, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            x, gap, half = panel.wall
            axes.plot([x, x], [0, gap - half], color=INK, linewidth=3, solid_capstyle="butt")
            axes.plot([x, x], [gap + half, 1], color=INK, linewidth=3, solid_capstyle="butt")
            axes.add_patch(Circle(panel.disc[:2], panel.disc[2], color=INK, alpha=0.55, linewidth=0))
            axes.add_patch(Circle(panel.goal[:2], panel.goal[2], color=LINES[0], alpha=0.6, linewidth=0))
            for path, good in zip(panel.paths, panel.succeeded, strict=True):
                axes.plot(path[:, 0], path[:, 1], color=_GOOD if good else _BAD, linewidth=1.0, alpha=0.75)
            axes.plot(*panel.paths[0][0], marker="o", color=INK, markersize=4)
            axes.set_title(panel.title, color=INK, fontsize=9, loc="left")
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal")
            for spine in axes.spines.values():
                spine.set_color(INK)
                spine.set_alpha(0.4)
        told = "green: the goal is reached and nothing touched; red: something is touched, or the goal is not reached"
        figure.suptitle(told, color=INK, fontsize=8, x=0.01, ha="left")
        held = io.BytesIO()
        figure.savefig(held, format="png", facecolor="white")
    held.seek(0)
    return Image.open(held).convert("RGB")
