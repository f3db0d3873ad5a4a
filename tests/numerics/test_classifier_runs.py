"""ADM through the whole: an unconditional denoiser with a learned variance, and a classifier of its noisy latents, trained,
exported and drawn with by commands."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs import sampling
from latentray.checkpoint import manifest, weights
from latentray.config import compose
from latentray.config.export import Export
from latentray.config.sample import Sample
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.inference import classifier_folder
from latentray.inference.requests import SamplingRequest
from latentray.inference.sampling import TextToImage
from latentray.tracking import names
from latentray.training import consolidation

pytestmark = pytest.mark.slow
CLASSES = ["black", "gray", "white"]
"""What stands behind the shapes: a class that so small a network finds within a hundred steps."""
ADM = ["objective=adm", "objective.timestep_spread=sobol"]
CLASSIFIER = ["stage=classifier", "denoiser=classifier_tiny", "denoiser.classes=3"]
THIRDS = ("low", "middle", "high")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """`root`, `data` with labels, `autoencoder`, whose latents are of unit variance, and `latents` without text."""
    tiny, root = sys.modules["tiny"], tmp_path_factory.mktemp("classifier")
    for split, count in (("train", 96), ("validation", 24)):
        data = tiny.write_pictures(root, split, count, classes=CLASSES, told="background").rpartition("/")[0]
    autoencoder = tiny.write_autoencoder(str(root / "autoencoder"), scale=4.5)
    with pytest.MonkeyPatch.context() as patch:
        latents = tiny.write_latents(root, patch, data=data, autoencoder=autoencoder)
    return {"root": str(root), "data": data, "autoencoder": autoencoder, "latents": latents}


@pytest.fixture(scope="module")
def job(made):
    """(name, *overrides) -> a job of runs.py."""
    plain = [one for one in sys.modules["tiny"].SMALL if not one.startswith(("denoiser", "objective"))]

    def of(name: str, *overrides: str, **also) -> dict:
        where = ["run=" + name, f"out={made['root']}/{name}"]
        latents = [] if "online.enabled=true" in overrides else [f"latents={made['latents']}"]
        return {"name": name, "overrides": [*plain, *ADM, *overrides, *latents, *where], **also}

    return of


@pytest.fixture(scope="module")
def trained(made, job, run_jobs) -> Path:
    """The folder of the runs `denoiser`, `other`, `classifier`, `stored`, `online`."""
    denoiser = [
        "denoiser=unet_tiny_class", "denoiser.classes=null", "denoiser.out_channels=8", "stage.sampler=ddpm",
        "stage.sampling_steps=8", "stage.guidance_scale=1.0",
    ]  # fmt: skip
    online = ["online.enabled=true", f"data={made['data']}", f"autoencoder_from={made['autoencoder']}"]
    often = ["total_samples=960", "log_every_samples=96", "checkpoint_every_samples=480"]
    run_jobs(
        Path(made["root"]),
        [
            job("denoiser", *denoiser, "total_samples=480"),
            job("other", *denoiser, "objective.schedule=cosine"),
            job("classifier", *CLASSIFIER, *often),
            job("stored", *CLASSIFIER, "total_samples=96"),
            job("online", *CLASSIFIER, *online, "online.batch_size=16", "total_samples=96"),
        ],
    )
    return Path(made["root"])


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_says_how_well_at_each_noise_level(trained, made):
    told = lines(trained / "classifier")
    losses = [line[names.TRAIN_LOSS] for line in told if names.TRAIN_LOSS in line]
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    assert all(0 <= line[names.CLASSIFIER_ACCURACY] <= 1 for line in told if names.TRAIN_LOSS in line)
    last = told[-2]
    assert last[names.accuracy_at("low")] > 0.6 and last[names.accuracy_at("low")] > last[names.accuracy_at("high")]
    found = manifest.read(str(trained / "classifier" / "classifier"))
    assert found.kind == "classifier" and found.meta["figures"].keys() == {
        "loss", "accuracy", *(f"accuracy_at_{third}" for third in THIRDS),
    }  # fmt: skip
    assert found.inputs == {
        "latents": manifest.read(made["latents"] + "/train").digest,
        "autoencoder": manifest.read(made["autoencoder"]).digest,
    }
    assert told[-1][names.VALIDATION_ACCURACY] == found.meta["figures"]["accuracy"]
    assert found.meta["figures"]["accuracy_at_low"] > 0.4
    page = (trained / "classifier" / "report.html").read_text()
    assert "Accuracy" in page and "jobs.sample" in page


def test_pictures_encoded_as_it_goes_give_the_numbers_of_stored_latents(trained):
    one, other = (
        [line[names.TRAIN_LOSS] for line in lines(trained / name) if names.TRAIN_LOSS in line]
        for name in ("stored", "online")
    )
    assert one == other and len(one) == 12
    measured = [manifest.read(str(trained / name / "classifier")).meta["figures"] for name in ("stored", "online")]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


def test_its_gradient_draws_an_unconditional_model_to_a_class(trained):
    model = TextToImage.load(str(trained / "denoiser" / "model"), device="cpu")
    assert model.classes is None and model.model.objective.learned_variance
    model.guide_by(classifier_folder.load(str(trained / "classifier" / "classifier")))
    assert model.labels == (3, tuple(CLASSES))
    found = {}
    for scale in (0.0, 1.0, 4.0):
        requests = [
            SamplingRequest(
                prompt="", label=seed % 3, classifier_scale=scale, seed=seed, steps=8, guidance_scale=1.0,
                sampler="ddpm", height=64, width=64,
            )
            for seed in range(12)
        ]  # fmt: skip
        z = model.latents(requests)
        labels = torch.tensor([one.label for one in requests])
        with torch.no_grad():
            found[scale] = float(model.guide(z, torch.zeros(12, dtype=torch.long), labels).mean())
    assert found[0.0] < found[1.0] - 0.3 < found[4.0] - 0.3


def shell(trained: Path, tmp_path: Path, *overrides: str) -> Image.Image:
    settings = [f"release={trained / 'denoiser' / 'model'}", "n=2", "device=cpu", f"out={tmp_path}/s.png", *overrides]
    return Image.open(sampling.draw(compose.load("sample", Sample, settings)))


def test_it_is_named_in_a_command(trained, tmp_path):
    named = [f"classifier={trained / 'classifier' / 'classifier'}"]
    pulled = shell(trained, tmp_path, *named, "label=gray", "classifier_scale=8.0")
    digest = manifest.read(str(trained / "classifier" / "classifier")).digest
    about = json.loads(pulled.text["parameters"])
    assert (about["classifier_digest"], about["label"]) == (digest, "gray")
    free = shell(trained, tmp_path, *named, "label=1", "classifier_scale=0")
    assert pulled.tobytes() != free.tobytes()
    assert shell(trained, tmp_path, "prompt=gray").tobytes() == free.tobytes()
    several = shell(trained, tmp_path, *named, "label=gray", "compare=classifier", "compare_values=[0,1,8]")
    assert several.width > 1.3 * pulled.width and several.height > pulled.height


def test_what_it_does_not_know_is_refused_in_the_shell(trained, tmp_path):
    classifier = f"classifier={trained / 'classifier' / 'classifier'}"
    with pytest.raises(ConfigError, match="no class 'hexagon'"):
        shell(trained, tmp_path, classifier, "label=hexagon")
    with pytest.raises(FingerprintMismatch, match="noise levels"):
        shell(trained, tmp_path, classifier, "label=1", f"release={trained / 'other' / 'model'}")
    assert not (tmp_path / "s.png").exists()


def test_a_killed_run_ends_at_the_same_bits_and_its_weights_are_handed_out(trained, job, run_jobs, tmp_path):
    killed = job("killed", *CLASSIFIER, "total_samples=96", "checkpoint_every_samples=48")
    run_jobs(trained, [killed | {"die_at": 6}], expect=9)
    assert "at step 6" in run_jobs(trained, [killed])
    whole, resumed = (
        weights.read(trained / name / "classifier" / "classifier.safetensors") for name in ("stored", "killed")
    )
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    consolidation.export(Export(run=str(trained / "killed"), out=str(tmp_path / "weights")))
    assert weights.read(tmp_path / "weights" / "classifier.safetensors").keys() == whole.keys()


def test_two_workers_see_the_same_numbers(trained, job, run_jobs):
    run_jobs(trained, [job("two", *CLASSIFIER, "total_samples=96", "deepspeed=zero2")], world=2)
    for name in (names.TRAIN_LOSS, names.CLASSIFIER_ACCURACY, names.accuracy_at("low")):
        one, two = ([line.get(name, math.nan) for line in lines(trained / run)] for run in ("stored", "two"))
        assert one == pytest.approx(two, rel=1e-5, nan_ok=True) and len(one) > 12
