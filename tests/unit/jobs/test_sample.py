"""`python -m jobs.sample`: sheets, what stands inside them, and what is refused before anything is drawn."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
    drawn = np.asarray(Image.open(path))
    top = next(y for y in range(40) if np.array_equal(drawn[y + 16 : y + 32 : 2, 4:36:2][:, :16], pixels[8:]))
    assert not np.array_equal(drawn[top : top + 16 : 2, 4:36:2], pixels[:8])


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
