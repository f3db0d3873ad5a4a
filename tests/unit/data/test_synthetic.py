"""The shapes set: what is drawn is what the caption says, and picture i is always the same picture."""

import collections

import numpy as np
import pytest

from latentray.data import synthetic


def test_there_are_54_kinds_of_which_three_are_unseen():
    assert len(set(synthetic.KINDS)) == 54
    assert len(synthetic.SEEN) == 51
    for field in ("color", "shape", "background"):
        assert len({getattr(kind, field) for kind in synthetic.UNSEEN}) == 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_kinds_are_balanced_and_training_never_sees_the_unseen(split):
    counts = collections.Counter(synthetic.kind_of(split, i) for i in range(synthetic.SPLITS[split].default_n))
    assert max(counts.values()) == min(counts.values())
    assert set(counts) == set(synthetic.SEEN if split == "train" else synthetic.KINDS)


def test_caption():
    kind = synthetic.Kind(color="red", shape="circle", background="white")
    assert synthetic.caption(kind) == "a red circle on a white background"
    assert len({synthetic.caption(kind) for kind in synthetic.KINDS}) == 54


@pytest.mark.parametrize("kind", synthetic.KINDS[::4] + synthetic.UNSEEN, ids=synthetic.caption)
def test_a_picture_is_one_shape_wholly_inside_of_bounded_size(kind):
    for index in range(12):
        pixels = synthetic.draw(kind, 0, index)
        assert pixels.shape == (64, 64, 3)
        assert pixels.dtype == np.uint8
        touched = (pixels != synthetic.BACKGROUNDS[kind.background]).any(axis=-1)
        border = np.ones((64, 64), bool)
        border[1:-1, 1:-1] = False
        assert (touched & border).sum() <= 64  # at most one side of a square that was put at the edge
        for axis in (0, 1):
            extent = np.flatnonzero(touched.any(axis=axis))
            assert 21 <= extent[-1] - extent[0] + 1 <= 46
        assert (pixels == synthetic.COLORS[kind.color]).all(axis=-1).sum() > 22 * 22 * 0.4


@pytest.mark.parametrize(("shape", "share"), [("circle", np.pi / 4), ("square", 1.0), ("triangle", 0.5)])
@pytest.mark.parametrize("side", [22.0, 30.3, 44.0])
def test_coverage_has_the_area_of_the_shape(shape, share, side):
    coverage = synthetic.SHAPES[shape](7.3, 11.9, side)
    assert coverage.min() == 0
    assert coverage.max() == 1
    assert coverage.sum() == pytest.approx(share * side**2, rel=0.01)


def test_an_edge_is_antialiased():
    assert ((synthetic.SHAPES["circle"](9.2, 9.7, 30.0) % 1) > 0).sum() > 50


def test_a_picture_is_a_function_of_seed_split_and_index_alone():
    kind = synthetic.KINDS[5]
    picture = synthetic.draw(kind, 3, 7)
    np.testing.assert_array_equal(picture, synthetic.draw(kind, 3, 7))
    for other in (
        synthetic.draw(kind, 4, 7),
        synthetic.draw(kind, 3, 8),
        synthetic.draw(kind, 3, 7, split="validation"),
    ):
        assert (picture != other).any()
