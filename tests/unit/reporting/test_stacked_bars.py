"""Stacked bars: as high as their parts, and a line where the limit is."""

import numpy as np
import pytest
from PIL import Image

from latentray.reporting import stacked_bars
from latentray.reporting.curves import LINES


def shares(path) -> dict[str, int]:
    """Pixels of each colour of the palette."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    wanted = {color: [int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in LINES}
    return {color: int((np.abs(pixels - rgb).max(axis=2) <= 4).sum()) for color, rgb in wanted.items()}


def test_the_parts_of_a_bar_have_the_areas_of_their_values(tmp_path):
    path = tmp_path / "bars.png"
    stacked_bars.save(
        {"a": {"x": 3.0, "y": 1.0}, "b": {"x": 3.0, "y": 1.0}}, path, title="t", y_label="GiB", limit=("l", 5.0)
    )
    found = shares(path)
    assert found[LINES[0]] == pytest.approx(3 * found[LINES[1]], rel=0.15)  # the legend's squares count too
    assert found[LINES[2]] == 0


def test_parts_that_one_bar_lacks_are_nothing(tmp_path):
    stacked_bars.save({"a": {"x": 1.0}, "b": {"y": 1.0}}, tmp_path / "bars.png")
    found = shares(tmp_path / "bars.png")
    assert found[LINES[0]] == pytest.approx(found[LINES[1]], rel=0.1)
    with pytest.raises(ValueError, match="no bars"):
        stacked_bars.save({}, tmp_path / "none.png")
