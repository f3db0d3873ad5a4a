"""metrics.jsonl: complete at every moment, no gap and no duplicate after a resume, valid JSON for any value."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.tracking.jsonl import JsonlTracker


def _samples(folder):
    return [json.loads(line)["samples"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    tracker = JsonlTracker(tmp_path)
    tracker.log(96, {"train/loss": 0.25})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())  # not finished, not flushed by hand
    assert record["samples"] == 96
    assert record["train/loss"] == 0.25
    assert record["time"] > 0
    tracker.finish()
    tracker.finish()


@settings(max_examples=25, deadline=None)
@given(steps=st.integers(1, 20), checkpoint=st.integers(0, 20), torn=st.binary(max_size=20), told=st.booleans())
def test_a_resumed_run_reads_like_an_uninterrupted_one(tmp_path_factory, steps, checkpoint, torn, told):
    folder = tmp_path_factory.mktemp("run")
    checkpoint = min(checkpoint, steps)
    first = JsonlTracker(folder, resumed_at=0)
    for step in range(1, steps + 1):
        first.log(96 * step, {"train/loss": 1 / step})
    first.finish()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"samples": 99' + torn.replace(b"\n", b""))  # killed in the middle of a line
    second = JsonlTracker(folder, resumed_at=96 * checkpoint if told else None)
    for step in range(checkpoint + 1, steps + 3):
        second.log(96 * step, {"train/loss": 1 / step})
    second.finish()
    assert _samples(folder) == [96 * step for step in range(1, steps + 3)]


def test_a_new_run_does_not_keep_an_old_ones_lines(tmp_path):
    for _ in range(2):
        tracker = JsonlTracker(tmp_path, resumed_at=0)
        tracker.log(96, {"train/loss": 1.0})
        tracker.finish()
    assert _samples(tmp_path) == [96]


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (-np.inf, "-inf")])
def test_what_is_no_number_is_written_as_valid_json(tmp_path, value, text):
    tracker = JsonlTracker(tmp_path)
    tracker.log(96, {"train/loss": value})
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["train/loss"] == text
    assert str(float(text)) == text


def test_pictures_and_artifacts_lie_beside_the_metrics(tmp_path):
    tracker = JsonlTracker(tmp_path)
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    tracker.image(960, "pictures/samples", pixels, "a red circle on a white background")
    tracker.artifact("mine", "autoencoder", "s3://b/a", "sha256:ab", {"dataset": "sha256:cd"}, {"psnr": 25.0})
    with Image.open(tmp_path / "pictures" / "samples-000000960.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.text["caption"] == "a red circle on a white background"
    record = json.loads((tmp_path / "artifacts.jsonl").read_text())
    assert record["inputs"] == {"dataset": "sha256:cd"}
    assert record["metadata"] == {"psnr": 25.0}
