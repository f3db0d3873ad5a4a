"""Whole runs of stage 2 for each way to tell a denoiser what to draw: train, stop, go on, export, sample."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentray.checkpoint import weights
from latentray.errors import ConfigError
from latentray.evaluation import heldout
from latentray.inference.requests import SamplingRequest
from latentray.inference.sampling import TextToImage

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
CLASSES = ["blue", "green", "red"]
DENOISERS = {
    "sdxl": ["denoiser=unet_tiny_sdxl", "stage.encoder_dropout=0.4"],
    "sd3": ["denoiser=mmdit_tiny_sd3", "stage.encoder_dropout=0.4"],
    "refiner": ["denoiser=unet_tiny_sdxl_refiner"],
    "text_and_picture": ["denoiser=unet_tiny_sd1", "denoiser.combine=sequence"],
    "learned": ["denoiser=unet_tiny_sd1", "denoiser.context_layers=1", "denoiser.context_vocabulary=300"],
}


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_for_conditions", HERE / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _start(root: Path, jobs: list[tuple[str, list[str]]], *, last_dies_at: int | None = None) -> str:
    listed = [
        {"name": name, "overrides": [*overrides, f"run={name}", f"out={root / name}"]} for name, overrides in jobs
    ]
    listed[-1]["die_at"] = last_dies_at
    (root / "jobs.json").write_text(json.dumps(listed))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    done = subprocess.run(
        [sys.executable, str(HERE / "runs.py"), str(root / "jobs.json"), str(port)],
        env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if last_dies_at is None else 9), done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """The folder of all runs."""
    root, tiny = tmp_path_factory.mktemp("conditions"), _load("tiny")
    plain = [one for one in tiny.STAGE2 if not one.startswith(("denoiser", "objective.offset"))]
    plain += ["total_samples=24", "ema_half_life_samples=8", "stage.sampling_steps=2"]
    data = tiny.write_pictures(root, "train", 24, classes=CLASSES).rpartition("/")[0]
    autoencoder, latents, encoders = inputs["autoencoder"], {}, {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in DENOISERS:
            encoders[kind] = tiny.write_encoders(root / kind / "encoders", kind)
            latents[kind] = tiny.write_latents(
                root / kind, patch, data=data, autoencoder=autoencoder, text_encoders=encoders[kind]
            )
    jobs = {kind: [*plain, *settings, f"latents={latents[kind]}"] for kind, settings in DENOISERS.items()}
    jobs["class"] = [*plain, "denoiser=unet_tiny_class", "denoiser.classes=3", f"latents={latents['sdxl']}"]
    jobs["variance"] = [
        *jobs["class"], "denoiser.out_channels=8", "objective=epsilon", "objective.schedule=linear",
        "objective.learned_variance=true", "stage.sampler=ddpm",
    ]  # fmt: skip
    jobs["sd2"] = [*plain, "denoiser=unet_tiny_sd2", "objective=v", f"latents={inputs['latents']}"]
    jobs["sd35"] = [*plain, "denoiser=mmdit_tiny_sd35", "objective=flow", f"latents={latents['sd3']}"]
    jobs["sdxl_never"] = [*jobs["sdxl"], "stage.encoder_dropout=0"]
    jobs["sdxl_zero"] = [*jobs["sdxl"], "stage.zero_when_dropped=true"]
    jobs["sdxl_on"] = [*jobs["sdxl"], f"denoiser_from={root / 'sdxl_zero' / 'model'}"]
    online = ["online.enabled=true", f"data={data}", f"autoencoder_from={autoencoder}", "online.batch_size=16"]
    online += ["online.text_dtype=float32", f"online.text_encoders=[{','.join(map(tiny.listed, encoders['sdxl']))}]"]
    killed = [*plain, *DENOISERS["sdxl"], *online, "checkpoint_every_samples=16"]
    other = [one.replace("layer: 2}", "layer: 1}") for one in killed]
    _start(root, [*jobs.items(), ("sdxl_online", killed)], last_dies_at=2)
    told = _start(root, [("sdxl_online", other), ("sdxl_online", killed)])
    assert "FingerprintMismatch" in told and "at step 2" in told
    return root


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [one["train/loss"] for one in lines if "train/loss" in one]


def same(a: Path, b: Path, name: str) -> bool:
    one, two = weights.read(a / name), weights.read(b / name)
    return one.keys() == two.keys() and all(bool((one[key] == two[key]).all()) for key in one)


def drawn(model: TextToImage, **changes) -> np.ndarray:
    sampler = "ddim" if "ddim" in model.samplers else "flow_euler"
    values = {"prompt": "a red circle", "steps": 2, "guidance_scale": 3.0, "seed": 5, "sampler": sampler}
    values |= {"height": model.size, "width": model.size}
    return model.sample([SamplingRequest(**(values | changes))])[0].pixels_HWC.astype(int)


def test_a_killed_run_from_pictures_ends_at_the_bits_of_stored_conditions(finished):
    """Two encoders, each embedding stored or made online; the second half after a kill."""
    one, two = finished / "sdxl", finished / "sdxl_online"
    assert losses(one) == losses(two) and len(set(losses(one))) == 3
    for name in ("raw.safetensors", "model/denoiser.safetensors"):
        assert same(one, two, name)


def test_encoders_are_dropped_each_by_itself(finished):
    assert losses(finished / "sdxl") != losses(finished / "sdxl_never")


def test_zeros_that_stood_for_dropped_captions_stand_for_a_missing_negative_prompt(finished):
    """And so they do in a run that goes on from that model, and says nothing of it."""
    assert losses(finished / "sdxl") != losses(finished / "sdxl_zero")
    for name, zero in (("sdxl", False), ("sdxl_zero", True), ("sdxl_on", True)):
        model = TextToImage.load(str(finished / name / "model"), device="cpu")
        assert model.model.zero_when_empty is zero
        assert np.array_equal(drawn(model), drawn(model, negative_prompt="")) is not zero


@pytest.mark.parametrize(
    ("kind", "count"),
    [("sdxl", 2), ("sd3", 3), ("sd35", 3), ("sd2", 1), ("refiner", 1), ("text_and_picture", 2), ("learned", 1)],
)
def test_the_model_folder_carries_every_encoder_and_draws_what_it_is_told(finished, kind, count):
    model = TextToImage.load(str(finished / kind / "model"), device="cpu")
    assert len(model.model.text_encoders) == count
    assert np.abs(drawn(model) - drawn(model, prompt="a blue square")).max() > 0
    assert any((finished / kind).rglob("*samples*.png"))


def test_variations_are_drawn_of_a_picture_with_and_without_words(finished):
    model = TextToImage.load(str(finished / "text_and_picture" / "model"), device="cpu")
    like = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    assert np.abs(drawn(model, like_HWC=like) - drawn(model)).max() > 0
    assert np.abs(drawn(model, like_HWC=like, prompt="") - drawn(model, prompt="")).max() > 0
    assert np.abs(drawn(model, like_HWC=like) - drawn(model, like_HWC=255 - like)).max() > 0
    without = TextToImage.load(str(finished / "sdxl" / "model"), device="cpu")
    with pytest.raises(ConfigError) as caught:
        drawn(without, like_HWC=like)
    assert caught.value.where == "like"


def test_a_model_of_classes_draws_them_by_number_and_knows_their_names(finished):
    model = TextToImage.load(str(finished / "class" / "model"), device="cpu")
    assert (model.classes, model.class_names) == (3, tuple(CLASSES)) and model.model.text_encoders == ()
    assert np.abs(drawn(model, label=0) - drawn(model, label=1)).max() > 0
    assert losses(finished / "class") != losses(finished / "sdxl_never")


def test_the_learned_text_encoder_is_trained_averaged_and_in_the_model_folder(finished):
    raw = weights.read(finished / "learned" / "raw.safetensors")
    averaged = weights.read(finished / "learned" / "model" / "denoiser.safetensors")
    names = [name for name in raw if name.startswith("context_encoder.")]
    assert "context_encoder.token.weight" in names and set(names) <= averaged.keys()
    assert any(bool((raw[name] != averaged[name]).any()) for name in names)
    folder = finished / "learned" / "model" / "text_encoders" / "words"
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_held_out_loss_is_told_labels_and_pictures(finished):
    pictures = np.random.default_rng(1).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    of_classes = TextToImage.load(str(finished / "class" / "model"), device="cpu")
    told, null = (heldout.loss(of_classes, pictures, ["", ""], seed=0, labels=labels) for labels in ([0, 1], None))
    assert told["heldout_loss"] != null["heldout_loss"]


def test_a_learned_variance_trains_and_is_drawn_with(finished):
    """ADM's objective: the other half of the output moves, and another variance is another picture."""
    model = TextToImage.load(str(finished / "variance" / "model"), device="cpu")
    assert model.model.objective.learned_variance and all(np.isfinite(losses(finished / "variance")))
    first = drawn(model, label=1, sampler="ddpm", steps=4)
    with torch.no_grad():
        model.denoiser.conv_out.bias[4:] += 4.0
    assert np.abs(drawn(model, label=1, sampler="ddpm", steps=4) - first).max() > 0
    same_mean = [drawn(model, label=1, sampler="ddim", steps=4)]
    with torch.no_grad():
        model.denoiser.conv_out.bias[4:] -= 8.0
    assert np.array_equal(drawn(model, label=1, sampler="ddim", steps=4), same_mean[0])
    pictures = np.random.default_rng(1).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    assert 0 < heldout.loss(model, pictures, ["", ""], seed=0, labels=[0, 1])["heldout_loss"] < 10
