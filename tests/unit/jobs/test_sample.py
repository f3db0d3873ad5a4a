"""`python -m jobs.sample`: sheets, what stands inside them, and what is refused before anything is drawn."""

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from jobs import sampling
from latentray import build
from latentray.config import command, compose
from latentray.config.objective import ObjectiveConfig
from latentray.config.sample import Sample
from latentray.errors import ConfigError


def _models():
    path = Path(__file__).parents[1] / "inference" / "conftest.py"
    spec = importlib.util.spec_from_file_location("inference_models", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


write_model = _models().write_model


@pytest.fixture(scope="module")
def release(write_model):
    return write_model(ObjectiveConfig(schedule="flow", prediction="flow"), sampler="flow_euler")


def run(*overrides: str) -> str:
    return sampling.draw(compose.load("sample", Sample, list(overrides)))


def test_a_grid_says_how_it_was_drawn(release, tmp_path):
    path = run(f"release={release}", "prompt=a red circle", "n=3", "seed=5", "steps=4", f"out={tmp_path}/grid.png")
    with Image.open(path) as image:
        about = json.loads(image.text["parameters"])
        assert image.width >= 3 * 32  # small pictures are doubled
    assert (about["prompts"], about["seed"], about["steps"], about["n"]) == (["a red circle"], 5, 4, 3)
    assert about["release"] == release and len(about["model"]) == 64


@pytest.fixture(scope="module")
def of_clips(write_model):
    denoiser = dataclasses.replace(_models().DENOISER, family="video")
    return write_model(ObjectiveConfig(prediction="v"), denoiser=denoiser, frames=4, fps=8.0)


@pytest.mark.parametrize(("suffix", "frames"), [("png", None), ("webp", 6), ("png", 1)])
def test_clips_are_one_animated_sheet(of_clips, tmp_path, suffix, frames):
    settings = [] if frames is None else [f"frames={frames}"]
    out = f"{tmp_path}/clips.{suffix}"
    run(f"release={of_clips}", "prompt=a red circle", "n=3", "steps=2", f"out={out}", *settings)
    with Image.open(out) as image:
        count = getattr(image, "n_frames", 1)
        shown = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        about = json.loads(image.text["parameters"] if suffix == "png" else image.getexif()[0x010E])
    assert count == len(shown) == (frames or 4)
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(shown))
    assert shown[0].shape[1] >= 3 * 32
    assert about["prompts"] == ["a red circle"] and about["n"] == 3


def test_clips_as_mp4(of_clips, tmp_path):
    run(f"release={of_clips}", "prompt=a red circle", "n=1", "steps=2", f"out={tmp_path}/clips.mp4")
    with av.open(f"{tmp_path}/clips.mp4") as container:
        assert container.streams.video[0].average_rate == 8
        assert sum(1 for _ in container.decode(video=0)) == 4


def test_clips_are_compared_on_a_sheet_too(of_clips, tmp_path):
    out = run(
        f"release={of_clips}", "prompt=x", "compare=steps", "compare_values=[1,2]", "n=1", f"out={tmp_path}/s.png"
    )
    with Image.open(out) as image:
        assert image.n_frames == 4


@pytest.mark.parametrize(
    ("kind", "settings", "where"),
    [
        ("release", ["frames=4"], "frames"),
        ("release", ["out=x.webp"], "out"),
        ("of_clips", ["out=x.mp4", "refiner=r"], "refiner"),
        ("of_clips", ["picture=p.png"], "picture"),
    ],
)
def test_what_does_not_fit_the_kind_of_model_is_refused(request, tmp_path, monkeypatch, kind, settings, where):
    monkeypatch.chdir(tmp_path)
    uri = request.getfixturevalue(kind)
    Image.new("RGB", (16, 16)).save(tmp_path / "p.png")
    settings = [one.replace("refiner=r", f"refiner={uri}") for one in settings]
    with pytest.raises(ConfigError) as caught:
        run(f"release={uri}", "prompt=a red circle", "n=1", "steps=2", *settings)
    assert caught.value.where == where
    assert not (tmp_path / "x.webp").exists() and not (tmp_path / "x.mp4").exists()


def test_one_row_per_prompt_of_a_file(release, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square\n")
    one = Image.open(run(f"release={release}", "prompt=a red circle", "n=2", f"out={tmp_path}/one.png"))
    two = Image.open(run(f"release={release}", f"prompts={tmp_path}/prompts.txt", "n=2", f"out={tmp_path}/two.png"))
    assert two.height > 1.7 * one.height


@pytest.mark.parametrize(
    ("compare", "rows", "columns"),
    [("sampler", 4, 2), ("guidance", 2, 3), ("steps", 4, 3)],
)
def test_a_sheet_compares(release, compare, rows, columns):
    settings = ["compare=" + compare, "n=2", *([] if compare == "sampler" else ["compare_values=[1,2,3]"])]
    config = compose.load("sample", Sample, [f"release={release}", "prompt=a red circle", *settings])
    model = sampling.TextToImage.load(release, device="cpu")
    sheet = sampling.plan(config, model, ["a red circle"], None, None)
    assert (len(sheet.requests), sheet.columns) == (rows * columns, columns)
    assert (len(sheet.row_labels), len(sheet.column_labels)) == (rows, columns)
    by_row = [sheet.requests[i : i + columns] for i in range(0, len(sheet.requests), columns)]
    if compare == "guidance":
        assert [r.guidance_scale for r in by_row[0]] == [1, 2, 3] and len({r.seed for r in by_row[0]}) == 1
    else:
        assert [row[0].sampler for row in by_row] == list(model.samplers)
        assert all(len({r.sampler for r in row}) == 1 for row in by_row)
    assert sheet.title.startswith("a red circle, ")
    if compare == "steps":
        assert [r.steps for r in by_row[0]] == [1, 2, 3]


def test_inpainting_from_files_keeps_the_rest(release, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:8] = 255
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    path = run(
        f"release={release}", "prompt=a red circle", "n=1", f"picture={tmp_path}/picture.png", f"mask={tmp_path}/mask.png",
        f"out={tmp_path}/out.png",
    )  # fmt: skip
    # One row of two pictures of 16 pixels, doubled, in cells as wide as words.
    sheet = np.asarray(Image.open(path))[4:36:2]
    places = [x for x in range(sheet.shape[1] - 32) if np.array_equal(sheet[8:, x : x + 32 : 2], pixels[8:])]
    given, drawn = (sheet[:8, x : x + 32 : 2] for x in (places[0], places[-1]))
    assert np.array_equal(np.unique(given), [205, 240])  # a chequerboard stands where the mask is
    assert not np.array_equal(drawn, pixels[:8]) and not np.array_equal(drawn, given)


def test_what_was_given_begins_every_row(release, write_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    model = sampling.TextToImage.load(release, device="cpu")
    for compare, columns in (("none", 2), ("guidance", 3)):
        overrides = [f"release={release}", "prompt=x", "n=2", f"compare={compare}", f"picture={tmp_path}/picture.png"]
        config = compose.load("sample", Sample, overrides)
        config.compare_values = [] if compare == "none" else [1.0, 2.0, 3.0]
        sheet = sampling.plan(config, model, ["x"], pixels, None)
        assert sheet.columns == columns and list(sheet.given) == ["given"]
        assert np.array_equal(sheet.given["given"], pixels)
    alone = Image.open(run(f"release={release}", "prompt=x", "n=2", f"out={tmp_path}/alone.png"))
    edited = Image.open(
        run(f"release={release}", "prompt=x", "n=2", f"picture={tmp_path}/picture.png", f"out={tmp_path}/edited.png")
    )
    assert edited.width > 1.4 * alone.width and edited.height == alone.height


def test_a_picture_that_is_cut_is_told_of(release, tmp_path, capsys):
    Image.new("RGB", (40, 20)).save(tmp_path / "wide.png")
    run(f"release={release}", "prompt=x", "n=1", f"picture={tmp_path}/wide.png", f"out={tmp_path}/out.png")
    assert "the picture was resized and cut to 16x16" in capsys.readouterr().out


def test_a_refiner_ends_what_the_model_began(release, write_model, tmp_path):
    flow = ObjectiveConfig(schedule="flow", prediction="flow")
    refiner = write_model(flow, seed=9, sampler="flow_euler")
    asked = [f"release={release}", "prompt=a red circle", "n=1", "steps=8"]
    alone, same, other = (
        np.asarray(Image.open(run(*asked, *more, f"out={tmp_path}/{name}.png")))
        for name, more in (("alone", []), ("same", [f"refiner={release}"]), ("other", [f"refiner={refiner}"]))
    )
    assert np.array_equal(alone, same) and not np.array_equal(alone, other)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prompt=x"], "release"),
        (["release=here"], "prompt"),
        (["release=nowhere/at/all", "prompt=x"], "nowhere/at/all"),
        (["release=RELEASE", "prompt=x", "sampler=ddim"], "flow_euler"),
        (["release=RELEASE", "prompt=x", "steps=0"], "steps"),
        (["release=RELEASE", "prompt=x", "size=17x16"], "size"),
        (["release=RELEASE", "prompt=x", "size=big"], "size"),
        (["release=RELEASE", "prompt=x", "guidance_scale=-2"], "guidance_scale"),
        (["release=RELEASE", "prompt=x", "picture=none.png"], "none.png"),
        (["release=RELEASE", "prompt=x", "mask=none.png"], "picture"),
        (["release=RELEASE", "prompts=none.txt"], "none.txt"),
        (["release=RELEASE", "prompt=x", "compare=seed"], "sampler, guidance, steps"),
        (["release=RELEASE", "prompt=x", "out=grid.jpg"], "png"),
        (["release=RELEASE", "prompt=x", "device=tpu"], "device"),
        (["release=RELEASE", "prompt=x", "refiner=RELEASE", "picture=none.png"], "refiner"),
        (["release=RELEASE", "prompts=none.txt", "compare=steps"], "one prompt"),
        (["release=RELEASE", "prompt=x", "compare_values=[1,2]"], "compare_values"),
        (["release=production", "prompt=x"], "registry="),
        (["release=RELEASE", "prompt=x", "stesp=3"], "steps"),
    ],
)
def test_a_mistake_ends_with_one_message(release, overrides, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = command.run("sample", Sample, sampling.draw, [o.replace("RELEASE", release) for o in overrides])
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("error: ") and words in message and "Traceback" not in message
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        build.device("cuda")
    assert caught.value.where == "device"
    assert build.device("auto") == torch.device("cpu")


def test_a_class_is_drawn_without_a_prompt_and_one_that_is_not_known_is_refused(write_model, tmp_path):
    denoiser = dataclasses.replace(_models().DENOISER, context_width=None, classes=3)
    release = write_model(ObjectiveConfig(prediction="v"), denoiser=denoiser)
    few = ["n=1", "steps=2", f"out={tmp_path}/class.png", "device=cpu"]
    with Image.open(run(f"release={release}", "label=2", *few)) as image:
        assert json.loads(image.text["parameters"])["label"] == "2"
    for wanted in ("label=3", "label=zebra"):
        with pytest.raises(ConfigError) as caught:
            run(f"release={release}", wanted, *few)
        assert caught.value.where == "label" and "0 to 2" in caught.value.mend


def test_a_model_without_a_vision_encoder_is_given_no_picture_to_vary(release, tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "like.png")
    for given, where in ((f"like={tmp_path}/like.png", "like"), ("label=0", "label")):
        with pytest.raises(ConfigError) as caught:
            run(f"release={release}", given, "n=1", "steps=2", f"out={tmp_path}/x.png")
        assert caught.value.where == where
