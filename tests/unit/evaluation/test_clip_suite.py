"""`suite=clips`: figures of true clips are perfect, those of a fresh model are not, and the report shows both kinds of sheet."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.config.objective import ObjectiveConfig
from latentray.data import index, shards, synthetic_clips
from latentray.data.shards import IndexedShards
from latentray.errors import ConfigError, SampleRejected
from latentray.evaluation import clip_suite, heldout
from latentray.inference.sampling import TextToImage

FRAMES, FPS = 4, 8.0


def _models():
    path = Path(__file__).parents[1] / "inference" / "conftest.py"
    spec = importlib.util.spec_from_file_location("models_for_clip_suite", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_model = _models().write_model


@pytest.fixture(scope="module")
def of_clips(write_model) -> str:
    denoiser = dataclasses.replace(_models().DENOISER, family="video")
    return write_model(ObjectiveConfig(prediction="v"), denoiser=denoiser, frames=FRAMES, fps=FPS)


def write_data(root: Path, *, frames: int, count: int = 5) -> str:
    (root / "built").mkdir(parents=True)
    drawn = synthetic_clips.samples("validation", seed=0, count=count, frames=frames, fps=FPS)
    index.write([shards.write_shard(drawn, root / "built" / shards.shard_name(0))], root / "built" / index.NAME)
    manifest.publish(root / "built", root / "data" / "validation", kind="dataset", meta={"source": "moving_shapes"})
    return str(root / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("clips"), frames=2 * FRAMES)


def config(*overrides: str) -> Evaluate:
    small = ["suite=clips", "samples=6", "heldout_samples=4", "per_kind=1", "steps=2", "device=cpu", "batch_size=4"]
    return compose.load("evaluate", Evaluate, [*small, *overrides])


def test_the_figures_of_true_clips_are_perfect():
    asked = [synthetic_clips.moving_of("train", i) for i in range(24)]
    true = np.stack([synthetic_clips.draw(moving, 0, i) for i, moving in enumerate(asked)])
    assert set(clip_suite.shapes_figures(true, asked).values()) == {1.0}
    backwards = clip_suite.shapes_figures(true[:, 7::-1], asked)
    assert backwards["samples.direction_accuracy"] == 0 and backwards["samples.color_accuracy"] == 1
    still = clip_suite.shapes_figures(np.repeat(true[:, 8:9], 8, axis=1), asked)
    assert still["samples.direction_accuracy"] == 0 and still["samples.shape_accuracy"] == 1


def test_a_report_has_figures_a_contact_sheet_and_an_animated_one(of_clips, data, tmp_path):
    out = clip_suite.evaluate(config(f"model={of_clips}", f"data={data}", f"out={tmp_path / 'report'}"))
    report = json.loads((Path(out) / "report.json").read_text())
    assert report["samples"] == 6 and report["model"] == manifest.read(of_clips).digest
    assert {"heldout_loss", "samples.direction_accuracy", "samples.color_accuracy"} <= report["metrics"].keys()
    assert "fid" not in report["metrics"] and report["feature_network"]["name"] == "none"
    with Image.open(Path(out) / "samples.png") as sheet, Image.open(Path(out) / "samples.webp") as animated:
        assert sheet.height > 6 * 16 and animated.n_frames == FRAMES
    assert manifest.read(out).inputs.keys() == {"model", "dataset"}


def test_the_held_out_loss_of_clips_depends_on_clips_and_seed_alone(of_clips, data):
    model = TextToImage.load(of_clips, device="cpu")
    originals, captions = clip_suite.load_clips(IndexedShards.open(f"{data}/validation"), model, limit=3)
    assert originals.shape == (3, FRAMES, 16, 16, 3) and "moving" in captions[0]
    figures = heldout.loss(model, originals, captions, seed=0)
    again = heldout.loss(model, originals, captions, seed=0)
    assert figures == again and len(figures) == heldout.LEVELS + 1
    assert all(0 < value < 10 for value in figures.values())
    other = heldout.loss(model, originals[:, ::-1].copy(), captions, seed=0)
    assert other["heldout_loss"] != figures["heldout_loss"]


def test_a_model_of_pictures_is_sent_to_its_own_suite(data, write_model):
    of_pictures = write_model(ObjectiveConfig(prediction="v"))
    with pytest.raises(ConfigError, match="draws pictures") as caught:
        clip_suite.evaluate(config(f"model={of_pictures}", f"data={data}"))
    assert caught.value.where == "suite"


def test_clips_that_are_too_short_are_named(of_clips, tmp_path):
    short = write_data(tmp_path, frames=2, count=2)
    with pytest.raises(SampleRejected, match="too few"):
        clip_suite.evaluate(config(f"model={of_clips}", f"data={short}"))
