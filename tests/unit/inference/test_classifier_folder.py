"""A classifier's folder: what it holds, which models it may guide, and what is drawn with it."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError, ConfigError, DigestMismatch, FingerprintMismatch, InputMissing
from latentray.inference import classifier_folder, model_folder
from latentray.inference.examples import example
from latentray.inference.sampling import TextToImage

NAMES = ("ape", "tench", "zebra")
V = ObjectiveConfig(prediction="v")
PLAIN = DenoiserConfig(channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=None, groups=4)
OF_CLASSES = dataclasses.replace(PLAIN, classes=3)
NET = dataclasses.replace(PLAIN, family="classifier", classes=3)


@pytest.fixture
def write(tmp_path):
    """(objective, latents, config, names) -> the URI of a published classifier, of random weights."""

    def made(objective=V, *, latents: str, config=NET, names=NAMES, kind="classifier") -> str:
        folder, number = tmp_path / "built", len(list(tmp_path.iterdir()))
        folder.mkdir()
        net = build.seeded(lambda: build.denoiser(config), 3)
        classifier_folder.write(
            folder, config=config, state=net.state_dict(), objective=objective, latents=latents, class_names=names
        )
        uri = tmp_path / f"published-{number}"
        manifest.publish(folder, uri, kind=kind)
        folder.rename(tmp_path / f"was-{number}")
        return str(uri)

    return made


@pytest.fixture(scope="module")
def model(load):
    return load(V, denoiser=PLAIN)


@pytest.fixture
def guided(model, write):
    """An unconditional model with a classifier."""
    model.guide_by(classifier_folder.load(write(latents=model.model.latents)))
    yield model
    model.guide = model.classifier = None


def asked(model, scale: float, label: int = 1, **changes):
    one = dataclasses.replace(example(model, "", seed=4), label=label, classifier_scale=scale)
    return dataclasses.replace(one, **({"steps": 6, "guidance_scale": 1.0} | changes))


def test_what_is_written_is_what_is_loaded(write):
    uri = write(latents="abc")
    found = classifier_folder.load(uri)
    assert (found.latents, found.class_names, found.classes, found.objective) == ("abc", NAMES, 3, V)
    assert found.digest == manifest.read(uri).digest
    net = build.seeded(lambda: build.denoiser(NET), 3).eval()
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        expected = net(x, t).log_softmax(1)
        for label in range(3):
            torch.testing.assert_close(found(x, t, torch.tensor([label, label])), expected[:, label])


def test_a_folder_that_is_none_or_was_changed_is_refused(write, tmp_path):
    with pytest.raises(InputMissing):
        classifier_folder.load(str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match="a model"):
        classifier_folder.load(write(latents="a", kind="model"))
    uri = write(latents="a")
    path = Path(uri) / "classifier.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatch, match="differs"):
        classifier_folder.load(uri)


def test_a_model_of_other_latents_is_refused(model, write):
    with pytest.raises(FingerprintMismatch, match="another autoencoder"):
        model.guide_by(classifier_folder.load(write(latents="another")))
    assert model.guide is None and model.classifier is None


@pytest.mark.parametrize(
    "other", [{"schedule": "cosine"}, {"timesteps": 500}, {"schedule": "flow", "prediction": "flow"}]
)
def test_a_model_of_other_noise_levels_is_refused(model, write, other):
    objective = dataclasses.replace(V, **other)
    with pytest.raises(FingerprintMismatch, match="noise levels"):
        model.guide_by(classifier_folder.load(write(objective, latents=model.model.latents)))


def test_another_prediction_of_the_same_noise_is_taken(model, write):
    epsilon = ObjectiveConfig(prediction="epsilon", weighting="min_snr")
    model.guide_by(classifier_folder.load(write(epsilon, latents=model.model.latents)))
    model.guide = model.classifier = None


def test_a_model_of_other_classes_is_refused(load, write):
    of_classes = load(V, denoiser=OF_CLASSES)
    four = dataclasses.replace(NET, classes=4)
    with pytest.raises(ConfigError, match="draws 3 classes"):
        of_classes.guide_by(classifier_folder.load(write(latents=of_classes.model.latents, config=four, names=())))
    of_classes.model.classes = ("ape", "carp", "zebra")
    with pytest.raises(ConfigError, match="other names"):
        of_classes.guide_by(classifier_folder.load(write(latents=of_classes.model.latents)))
    of_classes.model.classes = NAMES
    of_classes.guide_by(classifier_folder.load(write(latents=of_classes.model.latents)))
    assert of_classes.labels == (3, NAMES)


def test_clips_are_refused(load, write):
    clips = load(V, denoiser=dataclasses.replace(PLAIN, family="video"), frames=2, fps=8.0)
    with pytest.raises(ConfigError, match="clips"):
        clips.guide_by(classifier_folder.load(write(latents=clips.model.latents)))


def test_a_folder_of_before_there_were_classifiers_is_known_by_its_autoencoder(write_model, tmp_path):
    uri = write_model(V, denoiser=PLAIN)
    older = shutil.copytree(uri, tmp_path / "older")
    (older / manifest.NAME).unlink()
    described = json.loads((older / "config.json").read_text())
    told = described.pop("latents")
    (older / "config.json").write_text(json.dumps(described))
    manifest.publish(older, tmp_path / "again", kind="model")
    assert model_folder.load(str(tmp_path / "again")).latents == model_folder.load(uri).latents == told


def test_whether_it_fits_is_told_by_the_folders_descriptions_alone(write_model, write, tmp_path):
    uri = write_model(V, denoiser=PLAIN)
    latents = model_folder.load(uri).latents
    four = dataclasses.replace(NET, classes=4)
    classifier_folder.require_fit(write(latents=latents), model=uri)
    classifier_folder.require_fit(
        write(latents=latents, config=four, names=()), model=uri
    )  # it draws no classes itself
    for refused, error, told in (
        (write(latents="another"), FingerprintMismatch, "another autoencoder"),
        (write(dataclasses.replace(V, timesteps=500), latents=latents), FingerprintMismatch, "noise levels"),
        (write(latents=latents, kind="model"), ArtifactError, "a model"),
        (str(tmp_path / "nowhere"), InputMissing, "no artifact|not there|no manifest"),
    ):
        with pytest.raises(error, match=told):
            classifier_folder.require_fit(refused, model=uri)
    of_classes = write_model(V, denoiser=OF_CLASSES)
    with pytest.raises(ConfigError, match="draws 3 classes"):
        classifier_folder.require_fit(write(latents=latents, config=four, names=()), model=of_classes)


def test_a_model_without_classes_takes_a_label_by_its_classifier_alone(guided):
    assert (guided.classes, guided.labels, guided.name_of(1)) == (None, (3, NAMES), "tench")
    guided.check(asked(guided, 2.0))
    guided.check(asked(guided, 0.0))
    with pytest.raises(ConfigError, match="no class 3"):
        guided.check(asked(guided, 2.0, label=3))
    with pytest.raises(ConfigError, match="draws to a class"):
        guided.check(dataclasses.replace(asked(guided, 2.0), label=None))


@pytest.mark.parametrize("scale", [-1.0, math.inf, math.nan])
def test_a_scale_out_of_bounds_is_refused(guided, scale):
    with pytest.raises(ConfigError) as caught:
        asked(guided, scale)
    assert caught.value.where == "classifier_scale"


def test_without_a_classifier_a_model_without_classes_takes_no_label(model):
    for scale in (0.0, 2.0):
        with pytest.raises(ConfigError, match="does not draw classes"):
            model.check(asked(model, scale))
        with pytest.raises(ConfigError, match="does not draw classes"):
            model.latents([asked(model, scale)])


def log_p(guided: TextToImage, z: torch.Tensor, label: int) -> torch.Tensor:
    with torch.no_grad():
        return guided.guide(z, torch.zeros(len(z), dtype=torch.long), torch.full((len(z),), label))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "ddpm"])
def test_the_classifier_finds_its_class_likelier_the_harder_it_pulls(guided, sampler, guidance_scale):
    found = []
    for scale in (0.0, 4.0, 16.0):
        requests = [
            dataclasses.replace(asked(guided, scale, sampler=sampler, guidance_scale=guidance_scale), seed=seed)
            for seed in range(4)
        ]
        found.append(float(log_p(guided, guided.latents(requests), 1).mean()))
    assert found[0] < found[1] < found[2]


def test_at_scale_0_and_without_a_label_it_changes_nothing(guided):
    drawn = guided.latents([asked(guided, 0.0)])
    free = dataclasses.replace(asked(guided, 0.0), label=None)
    together = guided.latents([free, asked(guided, 9.0)])
    guided.guide = guided.classifier = None
    torch.testing.assert_close(drawn, guided.latents([free]))
    torch.testing.assert_close(together[:1], drawn, rtol=1e-4, atol=1e-4)


def test_a_learned_variance_goes_with_it(load, write):
    """ADM: twice the channels, sampled by ddpm."""
    objective = ObjectiveConfig(schedule="linear", learned_variance=True)
    adm = load(objective, denoiser=dataclasses.replace(PLAIN, out_channels=8))
    adm.guide_by(classifier_folder.load(write(ObjectiveConfig(schedule="linear"), latents=adm.model.latents)))
    free, pulled = (adm.latents([asked(adm, scale, sampler="ddpm")]) for scale in (0.0, 8.0))
    assert math.isfinite(float(pulled.sum())) and float(log_p(adm, pulled, 1)) > float(log_p(adm, free, 1))


def test_offloaded_it_draws_the_same(write_model, write):
    uri = write_model(V, denoiser=PLAIN)
    drawn = []
    for offload in (False, True):
        model = TextToImage(model_folder.load(uri), device="cpu", dtype=torch.float32, offload=offload)
        model.guide_by(classifier_folder.load(write(latents=model.model.latents)))
        drawn.append(model.latents([asked(model, 3.0)]).numpy())
    np.testing.assert_allclose(*drawn, atol=1e-5)
