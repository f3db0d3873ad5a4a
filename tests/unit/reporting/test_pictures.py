"""Grids: every pixel of every picture is there, labels never cover one, PNGs carry their parameters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.reporting import pictures


def _random(count, height=12, width=16):
    return np.random.default_rng(count).integers(0, 200, (count, height, width, 3), dtype=np.uint8)


def _contains(sheet, picture):
    pixels = np.asarray(sheet)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, picture.shape)[:, :, 0]
    return bool((windows == picture).all(axis=(2, 3, 4)).any())


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 7), columns=st.integers(1, 4), labelled=st.booleans())
def test_every_picture_is_whole_with_any_labels(count, columns, labelled):
    batch = _random(count)
    rows = -(-count // columns)
    labels = {}
    if labelled:
        labels = {
            "captions": ["a red circle on white"] * count,
            "row_labels": ["red"] * rows,
            "column_labels": ["x"] * columns,
        }
    sheet = pictures.grid(batch, columns, marked=range(count) if labelled else (), **labels)
    assert all(_contains(sheet, picture) for picture in batch)


def test_labels_are_ink_in_the_margin_and_scale_repeats_pixels():
    batch = np.full((2, 64, 64, 3), 255, np.uint8)
    plain = np.asarray(pictures.grid(batch, 2))
    assert (plain == 255).all()
    labelled = np.asarray(pictures.grid(batch, 2, row_labels=["reconstruction"]))
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 60
    assert labelled[:, :margin].min() < 120
    assert (labelled[:, margin + 4 :] == 255).all()
    one = _random(1)
    assert _contains(pictures.grid(one, 1, scale=3), one[0].repeat(3, axis=0).repeat(3, axis=1))


def test_pairs_put_each_reconstruction_below_its_original():
    originals, reconstructions = _random(5), _random(5)[::-1].copy()
    sheet = np.asarray(pictures.pairs(originals, reconstructions, columns=3))
    left = sheet.shape[1] - 3 * (16 + pictures.GAP)
    assert np.array_equal(sheet[4:16, left : left + 16], originals[0])
    assert np.array_equal(sheet[20:32, left : left + 16], reconstructions[0])
    assert np.array_equal(sheet[36:48, left : left + 16], originals[3])


def test_stacked_rows_have_captions_below_the_last_alone():
    rows = {"given": _random(5), "drawn": _random(5)[::-1].copy(), "original": _random(5)}
    sheet = np.asarray(pictures.stacked(rows, columns=3, captions=list("abcde")))
    plain = np.asarray(pictures.stacked(rows, columns=3))
    left = sheet.shape[1] - 3 * (16 + pictures.GAP)
    for number, row in enumerate(rows.values()):
        assert np.array_equal(sheet[4 + 16 * number : 16 + 16 * number, left : left + 16], row[0])
    line = pictures.FONT_SIZE + 3
    assert sheet.shape[0] == plain.shape[0] + 2 * line
    assert sheet[48 : 48 + line, left:].min() < 120  # its letters
    assert np.array_equal(sheet[52 + line : 64 + line, left : left + 16], rows["given"][3])


def test_what_a_mask_covers_is_a_chequerboard_and_a_small_picture_is_enlarged_by_its_pixels():
    (picture,) = _random(1, 32, 32)
    mask = np.zeros((32, 32), bool)
    mask[:, 8:] = True
    shown = pictures.veiled(picture, mask)
    assert np.array_equal(shown[~mask], picture[~mask]) and np.unique(shown[mask]).tolist() == [205, 240]
    assert np.array_equal(pictures.enlarged(picture, 3)[::3, 1::3], picture)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pictures.grid([], 2),
        lambda: pictures.grid(_random(2).astype(np.float32), 2),
        lambda: pictures.grid(_random(2), 2, captions=["one"]),
        lambda: pictures.grid(_random(4), 2, row_labels=["one"]),
        lambda: pictures.pairs(_random(2), _random(3)),
        lambda: pictures.pairs(_random(2)[:0], _random(2)[:0]),
        lambda: pictures.stacked({"drawn": _random(2)}, captions=["one"]),
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(ValueError, match=r"grid takes|picture is|captions for|row labels for|as many are wanted"):
        call()


def test_a_png_carries_how_it_was_made(tmp_path):
    path = tmp_path / "deep" / "a.png"
    pictures.save_png(_random(1)[0], path, {"caption": "ein größerer Kreis", "seed": "7"})
    with Image.open(path) as image:
        assert image.text == {"caption": "ein größerer Kreis", "seed": "7"}
        assert np.array_equal(np.asarray(image), _random(1)[0])


def test_a_long_word_is_cut_to_the_width():
    font = pictures.label_font(pictures.FONT_SIZE)
    for line in pictures._wrap(font, "an incomprehensibilities circle", 60):
        assert font.getlength(line) <= 60


def test_a_filmstrip_shows_the_first_the_last_and_frames_between():
    clips = np.random.default_rng(0).integers(0, 200, (2, 21, 12, 16, 3), dtype=np.uint8)
    sheet = pictures.filmstrips(list(clips), ["a red circle moving right", "another"], columns=5)
    for clip in clips:
        assert all(_contains(sheet, clip[t]) for t in (0, 5, 10, 15, 20))
        assert not any(_contains(sheet, clip[t]) for t in (1, 7, 19))
    short = pictures.filmstrips([clips[0][:3]], ["x"], columns=8)
    assert all(_contains(short, frame) for frame in clips[0][:3])
