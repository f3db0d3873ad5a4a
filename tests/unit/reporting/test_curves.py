"""Curves: what is read from metrics.jsonl, and SVGs that stand alone."""

import json
import xml.etree.ElementTree as ElementTree

import numpy as np

from latentray.reporting import curves


def _records(count=200):
    return [{"samples": 96 * i, "train/loss": 1.0 / i} for i in range(1, count + 1)]


def test_parse_passes_over_a_torn_line_and_series_over_what_is_no_number():
    text = "\n".join(
        json.dumps(r) for r in [*_records(2), {"samples": 288, "train/loss": "nan"}, {"samples": 300, "x": 1}]
    )
    records = curves.parse(text + '\n{"samples": 38')
    assert len(records) == 4
    samples, values = curves.series(records, "train/loss")
    assert samples.tolist() == [96, 192]
    assert values.tolist() == [1.0, 0.5]


def test_smoothing_keeps_a_constant_and_a_line_and_narrows_noise():
    assert np.allclose(curves.smoothed(np.full(50, 3.0), 10), 3.0)
    line = np.arange(100.0)
    assert np.allclose(curves.smoothed(line, 8)[20:80], line[20:80])  # centred: no lag
    noise = np.random.default_rng(0).normal(size=400)
    assert curves.smoothed(noise, 20).std() < 0.4 * noise.std()
    assert len(curves.smoothed(np.arange(3.0), 50)) == 3


def test_a_curve_is_one_svg_without_a_foreign_address_to_load():
    svg = curves.curve(_records(), {"train/loss": "training", "validation/loss": "held out"}, title="Loss", log_y=True)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "Loss" in svg
    assert "<!DOCTYPE" not in svg
    assert "<image" not in svg
    assert "@import" not in svg
    assert svg == curves.curve(
        _records(), {"train/loss": "training", "validation/loss": "held out"}, title="Loss", log_y=True
    )


def test_a_metric_without_values_says_so():
    assert "not measured" in curves.curve(_records(), ["autoencoder/lpips"])
    assert "not measured" in curves.curve([], ["train/loss"], log_y=True)
    assert "not measured" in curves.curve([{"samples": 1, "train/loss": -1.0}], ["train/loss"], log_y=True)
    assert "not measured" not in curves.curve(_records(1), ["train/loss"])
