"""The pixel checker reads originals, bears slight blur and noise, and calls what is no shape neither."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from latentray.data import synthetic
from latentray.data.synthetic import BACKGROUNDS, COLORS, KINDS, Kind
from latentray.evaluation import pixel_checker
from latentray.evaluation.pixel_checker import NOTHING, Reading, accuracy, read

N = 2000


@pytest.fixture(scope="module")
def kinds():
    return [synthetic.kind_of("validation", i) for i in range(N)]


@pytest.fixture(scope="module")
def originals(kinds):
    return [synthetic.draw(kind, 7, i, split="validation") for i, kind in enumerate(kinds)]


def degraded(pixels, rng, *, sigma, std):
    blurred = gaussian_filter(pixels.astype(float), (sigma, sigma, 0))
    return np.clip(np.rint(blurred + rng.normal(0, std, blurred.shape)), 0, 255).astype(np.uint8)


def painted(mask, *, color, background):
    pixels = np.empty((64, 64, 3), dtype=np.uint8)
    pixels[:] = BACKGROUNDS[background]
    pixels[mask] = COLORS[color] if isinstance(color, str) else color
    return pixels


def grid():
    return np.mgrid[0:64, 0:64] + 0.5


def test_it_reads_originals(originals, kinds):
    assert min(accuracy(originals, kinds).values()) >= 0.995


def test_it_bears_slight_blur_and_noise(originals, kinds):
    rng = np.random.default_rng(0)
    pictures = [degraded(p, rng, sigma=0.7, std=6) for p in originals]
    assert min(accuracy(pictures, kinds).values()) >= 0.995


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_blank_is_neither(background):
    blank = painted(np.zeros((64, 64), dtype=bool), color="red", background=background)
    assert read(blank) == Reading(color=None, shape=None, background=background)


@pytest.mark.parametrize("color", COLORS)
def test_a_blank_in_a_shape_colour_is_nothing(color):
    assert read(painted(np.ones((64, 64), dtype=bool), color=color, background="white")) == NOTHING


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_neither(seed):
    rng = np.random.default_rng(seed)
    uniform = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    normal = np.clip(rng.normal(128, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
    coarse = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    for picture in (uniform, normal, coarse):
        reading = read(picture)
        assert reading.color is None and reading.shape is None


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", ["circle", "square", "triangle"])
def test_half_size_shapes_off_centre_are_read(shape, background):
    y, x = grid()
    masks = {
        "circle": np.hypot(x - 10, y - 51) < 8,
        "square": (abs(x - 10) < 8) & (abs(y - 51) < 8),
        "triangle": (abs(x - 10) < (y - 43) / 2) & (y < 59),
    }
    reading = read(painted(masks[shape], color="blue", background=background))
    assert reading == Reading(color="blue", shape=shape, background=background)


def test_a_wrong_colour_is_wrong():
    kind = Kind(color="red", shape="circle", background="white")
    picture = synthetic.draw(Kind(color="orange", shape="circle", background="white"), 0, 0)
    assert accuracy([picture], [kind]) == {"color": 0.0, "shape": 1.0, "background": 1.0}


@pytest.mark.parametrize("rgb", [(30, 200, 220), (128, 128, 128), (250, 150, 200), (15, 15, 15)])
def test_a_colour_of_none_is_none_yet_its_shape_is_read(rgb):
    y, x = grid()
    reading = read(painted(np.hypot(x - 32, y - 32) < 15, color=rgb, background="white"))
    assert reading == Reading(color=None, shape="circle", background="white")


def odd_masks():
    y, x = grid()
    radius = np.hypot(x - 32, y - 32)
    return {
        "ring": (radius < 18) & (radius > 9),
        "triangle pointing down": (abs(x - 32) < (48 - y) / 2) & (y > 16),
        "bar": (abs(x - 32) < 20) & (abs(y - 32) < 6),
        "cross": ((abs(x - 32) < 5) | (abs(y - 32) < 5)) & (abs(x - 32) < 18) & (abs(y - 32) < 18),
        "two squares": ((abs(x - 16) < 8) & (abs(y - 16) < 8)) | ((abs(x - 48) < 8) & (abs(y - 48) < 8)),
    }


@pytest.mark.parametrize("name", odd_masks())
def test_other_shapes_are_no_shape_yet_their_colour_is_read(name):
    reading = read(painted(odd_masks()[name], color="green", background="black"))
    assert reading == Reading(color="green", shape=None, background="black")


def test_a_speck_does_not_stretch_the_box():
    y, x = grid()
    picture = painted(np.hypot(x - 40, y - 40) < 14, color="purple", background="gray")
    picture[5, 7] = COLORS["purple"]
    assert read(picture).shape == "circle"


def test_a_particoloured_shape_has_no_colour():
    y, x = grid()
    picture = painted((abs(x - 32) < 15) & (abs(y - 32) < 15), color="red", background="black")
    stripes = (abs(x - 32) < 15) & (abs(y - 32) < 15) & (y.astype(int) % 4 < 2)
    picture[stripes] = COLORS["green"]
    assert read(picture).color is None


def test_every_kind_is_told_from_every_other():
    readings = {read(synthetic.draw(kind, 3, i)) for i, kind in enumerate(KINDS)}
    assert len(readings) == len(KINDS)


def test_accuracy_wants_one_kind_per_picture(originals, kinds):
    with pytest.raises(ValueError, match="3 pictures for 2 kinds"):
        pixel_checker.accuracy(originals[:3], kinds[:2])
