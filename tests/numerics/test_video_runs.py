"""Clips through the whole: an image model begins a video model, which trains, is killed, goes on, and is drawn from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from jobs import sampling
from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.config import compose
from latentray.config.export import Export
from latentray.config.sample import Sample
from latentray.config.train import Train
from latentray.errors import FingerprintMismatch
from latentray.models.video import is_temporal
from latentray.training import consolidation, denoiser_weights

FRAMES, FPS = 4, 8.0


@pytest.fixture(scope="module")
def run(clips, run_jobs, tmp_path_factory) -> Path:
    """A run on clips from nothing, to its end."""
    import tiny
    import tiny_clips

    folder = tmp_path_factory.mktemp("clip_run")
    overrides = tiny_clips.settings(tiny, f"latents={clips['latents']}", "checkpoint_every_samples=24")
    run_jobs(folder, [{"name": "video", "overrides": [*overrides, "run=video", f"out={folder / 'video'}"]}])
    return folder / "video"


@pytest.fixture(scope="module")
def root(inputs, clips, run_jobs, tmp_path_factory) -> Path:
    """The folder of all runs: `image`, `free`, `frozen` (in bf16), and `killed`, as frozen with a kill in between."""
    import tiny
    import tiny_clips

    folder = tmp_path_factory.mktemp("video")
    image = [one for one in tiny_clips.settings(tiny, f"latents={inputs['latents']}") if one != "denoiser=video_tiny"]
    image.insert(0, "denoiser=unet_tiny_sd1")
    video = tiny_clips.settings(tiny, f"latents={clips['latents']}", f"denoiser_from={folder / 'image' / 'model'}")
    frozen = [one for one in video if not one.startswith("precision")]
    frozen += ["denoiser.train_only_temporal=true", "precision=bf16", "checkpoint_every_samples=16"]

    def job(name: str, overrides: list[str], **more) -> dict:
        return {"name": name, "overrides": [*overrides, f"run={name}", f"out={folder / name}"], **more}

    killed = job("killed", frozen)
    run_jobs(folder, [job("image", image), job("free", video), job("frozen", frozen), killed | {"die_at": 4}], expect=9)
    assert "at step 4" in run_jobs(folder, [killed])
    (folder / "settings.json").write_text(json.dumps({"video": video, "frozen": frozen}))
    return folder


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return weights.read(folder / "model" / "denoiser.safetensors")


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_clip_is_sampled_to_an_animated_file(run, tmp_path, suffix):
    out = tmp_path / f"clips.{suffix}"
    settings = [f"release={run / 'model'}", "prompt=a red circle on a white background moving right"]
    sampling.draw(compose.load("sample", Sample, [*settings, "n=2", "steps=3", "device=cpu", f"out={out}"]))
    with Image.open(out) as image:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
        assert image.n_frames == len(frames) == FRAMES
        assert image.info["duration"] == 125
    assert len({frame.tobytes() for frame in frames}) == FRAMES


def test_a_run_on_clips_leaves_a_model_that_knows_its_frames(run):
    found = losses(run)
    assert len(found) == len(set(found)) == 6 and all(0 < loss < 5 for loss in found)
    described = json.loads((run / "model" / "config.json").read_text())
    assert (described["frames"], described["fps"], described["denoiser"]["family"]) == (FRAMES, FPS, "video")
    assert any(run.rglob("*samples*.png")) and any((run / "checkpoints").glob("*/manifest.json"))


@pytest.mark.slow
def test_frozen_spatial_layers_are_the_image_models_bit_for_bit(root):
    image, free, frozen = (exported(root / name) for name in ("image", "free", "frozen"))
    assert free.keys() == frozen.keys() and {name for name in free if not is_temporal(name)} == image.keys()
    assert all(torch.equal(frozen[name], image[name]) for name in image)
    assert sum(not torch.equal(free[name], image[name]) for name in image) > len(image) / 2
    for state in (free, frozen):
        moved = [name for name in state if is_temporal(name) and name.endswith(("conv2.weight", "proj_out.weight"))]
        assert moved and all(state[name].any() for name in moved), "they began as zero"


@pytest.mark.slow
def test_both_train(root):
    for name in ("free", "frozen"):
        found = losses(root / name)
        assert len(found) == 6 and len(set(found)) == 6 and all(0 < loss < 5 for loss in found)


@pytest.mark.slow
def test_a_killed_run_with_frozen_layers_ends_at_the_same_bits(root):
    one, other = exported(root / "frozen"), exported(root / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_lineage_tells_where_it_came_from(root):
    model = manifest.read(str(root / "free" / "model"))
    assert model.inputs["denoiser"] == manifest.read(str(root / "image" / "model")).digest
    assert "denoiser" not in manifest.read(str(root / "image" / "model")).inputs


@pytest.mark.slow
def test_a_checkpoint_is_exported_whole(root, tmp_path):
    consolidation.export(Export(run=str(root / "killed"), out=str(tmp_path / "weights")))
    found, image = weights.read(tmp_path / "weights" / "denoiser.safetensors"), exported(root / "image")
    assert found.keys() == exported(root / "frozen").keys()
    assert all(torch.equal(found[name], image[name]) for name in image)


@pytest.mark.slow
def test_the_image_model_must_still_be_there_where_its_weights_were_kept(root):
    saved = manifest.read(str(next((root / "killed" / "checkpoints").glob("*/manifest.json")).parent))
    with pytest.raises(FingerprintMismatch, match="another model"):
        denoiser_weights.whole({}, {**saved.config, "denoiser_from": str(root / "free" / "model")}, saved.inputs)


@pytest.mark.slow
def test_a_clip_model_begins_another_as_it_is(root):
    """A run on from a video model takes its layers over time too."""
    settings = [one for one in json.loads((root / "settings.json").read_text())["video"] if "denoiser_from" not in one]
    config = compose.load("train", Train, [*settings, f"denoiser_from={root / 'free' / 'model'}"])
    net = build.denoiser(config.denoiser)
    denoiser_weights.find(config).fill(net)
    free = exported(root / "free")
    assert all(torch.equal(value, free[name]) for name, value in net.state_dict().items())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_workers_under_zero_3_follow_one(root, run_jobs):
    saved = json.loads((root / "settings.json").read_text())
    jobs = [
        {
            "name": name,
            "overrides": [*saved[of], "deepspeed=zero3", f"run={name}", f"out={root / name}"],
        }
        for name, of in (("free_two", "video"), ("frozen_two", "frozen"))
    ]
    run_jobs(root, jobs, world=2)
    assert losses(root / "free_two") == pytest.approx(losses(root / "free"), rel=1e-4)
    assert losses(root / "frozen_two") == pytest.approx(losses(root / "frozen"), rel=2e-2)  # bf16 sums
    image, frozen = exported(root / "image"), exported(root / "frozen_two")
    assert all(torch.equal(frozen[name], image[name]) for name in image)
