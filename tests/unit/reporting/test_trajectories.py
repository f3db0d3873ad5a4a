"""Ways through scenes as one picture: everything is where it is said to be."""

import numpy as np
import pytest

from latentray.reporting import trajectories
from latentray.reporting.trajectories import Panel


def panel(paths, succeeded) -> Panel:
    return Panel(
        title="a", wall=(0.6, 0.5, 0.1), disc=(0.3, 0.5, 0.1), goal=(0.9, 0.5, 0.05), paths=paths, succeeded=succeeded
    )


WAY = np.array([[0.1, 0.1], [0.55, 0.1]])


def test_panels_stand_in_rows():
    one = trajectories.picture([panel([WAY], [True])])
    six = trajectories.picture([panel([WAY], [True])] * 6, columns=3)
    assert six.width > 2.5 * one.width and six.height > 1.7 * one.height


def test_success_and_failure_are_told_apart_and_nothing_else_changes():
    good, bad = (np.asarray(trajectories.picture([panel([WAY], [ok])])).astype(int) for ok in (True, False))
    changed = np.abs(good - bad).sum(axis=2) > 30
    assert 0 < changed.sum() < 0.02 * changed.size
    rows, _ = np.nonzero(changed)
    assert rows.min() > 0.6 * len(changed), "the way runs along the lower edge"


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="no panels"):
        trajectories.picture([])
