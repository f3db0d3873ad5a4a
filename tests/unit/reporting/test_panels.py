"""Charts side by side in one PNG."""

import numpy as np
import pytest
from PIL import Image

from latentray.reporting import panels

LINES = panels.Panel(title="a", x_label="x", y_label="y", lines={"one": [(0, 0), (1, 1)], "two": [(0, 1), (1, 0)]})
BARS = panels.Panel(title="b", x_label="", y_label="y", bars={"left": {"p": 1.0, "q": 2.0}, "right": {"p": 0.5}})


def test_charts_stand_in_rows_and_show_their_colours(tmp_path):
    panels.save([LINES], tmp_path / "one.png")
    panels.save([LINES, BARS, LINES], tmp_path / "three.png")
    one, three = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")) for n in ("one", "three"))
    assert three.shape[1] > 1.8 * one.shape[1] and three.shape[0] > 1.8 * one.shape[0]
    right = three[: three.shape[0] // 2, three.shape[1] // 2 :]
    for color in panels.LINES[:2]:
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (right == rgb).all(axis=2).sum() > 500  # the bars


def test_no_charts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no charts"):
        panels.save([], tmp_path / "none.png")
