"""Real networks, small and random, behind the endpoint: what it answers is what the sampler draws, offloaded or not."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.conditioning import text, tiny_text_encoder
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.beside import BesideConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.config.serve import ServeConfig
from latentray.config.text_encoder import TinyTextEncoderConfig
from latentray.errors import ArtifactError, RequestRefused
from latentray.inference import classifier_folder, model_folder, sampling
from latentray.inference.requests import SamplingRequest
from latentray.inference.sampling import TextToImage
from latentray.models.autoencoder import KLAutoencoder, LatentScale
from serving import api, loading

AUTOENCODER = AutoencoderConfig(channels=[8, 8], blocks=1, groups=4, attention=False)
PLAIN = DenoiserConfig(channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4)
KINDS = {
    "plain": (PLAIN, BesideConfig()),
    "inpainting": (dataclasses.replace(PLAIN, in_channels=9), BesideConfig(kind="inpainting")),
    "larger": (dataclasses.replace(PLAIN, in_channels=7), BesideConfig(kind="super_resolution", factor=4)),
    "classes": (dataclasses.replace(PLAIN, context_width=None, classes=3), BesideConfig()),
}
SIZE = 16
PIXELS = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> dict[str, str]:
    """Kind -> a model folder."""
    encoder = tmp_path_factory.mktemp("encoder")
    tiny_text_encoder.write(
        encoder, ["a red circle", "a blue square"], TinyTextEncoderConfig(width=16, layers=1, heads=2, max_tokens=8)
    )
    root = tmp_path_factory.mktemp("models")
    weights.save(root / "autoencoder.safetensors", build.seeded(lambda: KLAutoencoder(AUTOENCODER), 0).state_dict())
    for name, (denoiser, beside) in KINDS.items():
        built = root / f"{name}-built"
        built.mkdir()
        model_folder.write(
            built,
            autoencoder_config=AUTOENCODER,
            autoencoder_weights=root / "autoencoder.safetensors",
            scale=LatentScale(shift=0.25, scale=3.0),
            denoiser_config=denoiser,
            denoiser_state=build.seeded(lambda config=denoiser: build.denoiser(config), 1).state_dict(),
            objective=ObjectiveConfig(prediction="v"),
            text_encoders=[] if name == "classes" else [text.load(str(encoder))],
            defaults=model_folder.SamplingDefaults(sampler="ddim", steps=3, guidance_scale=2.0),
            size=SIZE,
            beside=beside,
            classes=("ape", "tench", "zebra") if name == "classes" else (),
        )
        manifest.publish(built, root / name, kind="model")
    return {name: str(root / name) for name in KINDS}


@pytest.fixture(scope="module", autouse=True)
def float32():
    """Whatever this machine is fast in: strips are compared with wholes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_fast_dtype", lambda device: torch.float32)
        yield


@pytest.fixture(scope="module")
def serve(released):
    """(kind, settings) -> a client of an endpoint that serves it, in this process, as `.loaded` holds it."""

    class Backend:
        def __init__(self, loaded: loading.Loaded) -> None:
            self.loaded = loaded

        async def info(self):
            return self.loaded.info

        async def ready(self) -> bool:
            return True

        async def draw(self, requests):
            return self.loaded.draw(requests)

    def make(kind: str, **settings) -> TestClient:
        torch.set_num_threads(1)
        config = ServeConfig(release=released[kind], allow_anonymous=True, device="cpu", **settings)
        loaded = loading.load(config, released[kind], "r-1")
        loaded.warm_up()
        client = TestClient(api.create(config, Backend(loaded), key_hashes=[]))
        client.loaded = loaded
        return client

    return make


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures_of(reply) -> list[np.ndarray]:
    assert reply.status_code == 200, reply.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in reply.json()["data"]]


def edited(client: TestClient, image: np.ndarray, mask: np.ndarray | None = None, **fields) -> list[np.ndarray]:
    files = {"image": png(image)} | ({} if mask is None else {"mask": png(np.where(mask, 255, 0).astype(np.uint8))})
    return pictures_of(client.post("/v1/images/edits", data={"seed": 5, **fields}, files=files))


def asked(**changes) -> SamplingRequest:
    values = dict(prompt="", steps=3, guidance_scale=2.0, seed=5, sampler="ddim", height=SIZE, width=SIZE)
    return SamplingRequest(**(values | changes))


def shell(uri: str, *, classifier: str | None = None, **changes) -> np.ndarray:
    """The picture that `jobs.sample` would draw."""
    model = TextToImage.load(uri, device="cpu")
    if classifier is not None:
        model.guide_by(classifier_folder.load(classifier))
    return model.sample([asked(**changes)])[0].pixels_HWC


def test_a_picture_is_made_larger_as_by_the_sampler(serve, released):
    small = PIXELS[:4, :4]
    client = serve("larger")
    (drawn,) = edited(client, small, prompt="a red circle")
    assert np.array_equal(drawn, shell(released["larger"], prompt="a red circle", small_HWC=small))
    (other,) = edited(client, 255 - small, prompt="a red circle")
    (wide,) = edited(client, PIXELS[:4, :6])
    assert not np.array_equal(drawn, other) and wide.shape == (16, 24, 3)


@pytest.mark.parametrize("kind", ["plain", "inpainting"])
def test_the_pixels_that_a_mask_leaves_are_the_pictures_own(serve, released, kind):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[:, :8] = True
    (drawn,) = edited(serve(kind), PIXELS, mask, prompt="a red circle")
    assert np.array_equal(drawn[~mask], PIXELS[~mask]) and not np.array_equal(drawn[mask], PIXELS[mask])
    assert np.array_equal(drawn, shell(released[kind], prompt="a red circle", picture_HWC=PIXELS, mask_HW=mask))


def test_less_strength_stays_nearer_to_the_picture(serve, released):
    client = serve("plain")
    (drawn,) = edited(client, PIXELS, prompt="a red circle", strength=0.3)
    assert np.array_equal(drawn, shell(released["plain"], prompt="a red circle", picture_HWC=PIXELS, strength=0.3))
    assert not np.array_equal(drawn, edited(client, PIXELS, prompt="a red circle", strength=1)[0])


def test_a_class_is_drawn_by_number_and_by_name(serve, released):
    client = serve("classes")
    by_name, by_number, other = (
        pictures_of(client.post("/v1/images/generations", json={"label": label, "seed": 5}))[0]
        for label in ("tench", 1, 2)
    )
    assert np.array_equal(by_name, by_number) and not np.array_equal(by_name, other)
    assert np.array_equal(by_name, shell(released["classes"], label=1))
    (changed,) = edited(client, PIXELS, label="tench")
    assert np.array_equal(changed, shell(released["classes"], label=1, picture_HWC=PIXELS, strength=0.7))
    assert client.get("/v1/models").json()["data"][0]["latentray"]["class_names"] == ["ape", "tench", "zebra"]


@pytest.fixture(scope="module")
def classifier(released, tmp_path_factory) -> str:
    """Of the latents that all models here share, and three classes."""
    root = tmp_path_factory.mktemp("classifier")
    (root / "built").mkdir()
    config = dataclasses.replace(KINDS["classes"][0], family="classifier")
    classifier_folder.write(
        root / "built",
        config=config,
        state=build.seeded(lambda: build.denoiser(config), 3).state_dict(),
        objective=ObjectiveConfig(prediction="v"),
        latents=model_folder.load(released["plain"]).latents,
        class_names=("ape", "tench", "zebra"),
    )
    manifest.publish(root / "built", root / "published", kind="classifier")
    return str(root / "published")


@pytest.mark.parametrize("kind", ["plain", "classes"])
def test_a_classifier_draws_to_a_class_over_http(serve, released, classifier, kind):
    client = serve(kind, classifier=classifier)
    told = client.get("/v1/models").json()["data"][0]["latentray"]
    assert told["classifier"] and "label" in told["conditions"] and told["class_names"] == ["ape", "tench", "zebra"]
    for sent, drawn in (
        ({"label": "tench"}, {"label": 1, "classifier_scale": 1.0, "classifier": classifier}),
        ({"label": 1, "classifier_scale": 9}, {"label": 1, "classifier_scale": 9.0, "classifier": classifier}),
        ({"label": 1, "classifier_scale": 0}, {"label": 1 if kind == "classes" else None}),
    ):
        (answered,) = pictures_of(client.post("/v1/images/generations", json={"seed": 5, **sent}))
        assert np.array_equal(answered, shell(released[kind], **drawn))
    one, nine = (edited(client, PIXELS, label="tench", classifier_scale=scale)[0] for scale in (1, 9))
    assert not np.array_equal(one, nine)


def test_a_classifier_of_another_model_is_refused_before_a_replica_starts(released, classifier):
    config = ServeConfig(release=released["plain"], allow_anonymous=True, classifier=released["plain"])
    with pytest.raises(ArtifactError, match="classifier"):
        loading.require_settings(config, released["plain"])
    loading.require_settings(dataclasses.replace(config, classifier=classifier), released["plain"])


@pytest.mark.parametrize("kind", list(KINDS))
def test_offloaded_parts_draw_the_same_pictures(serve, kind):
    whole, parts = serve(kind), serve(kind, offload=True)
    assert parts.loaded.model.placement.offload and not whole.loaded.model.placement.offload
    image = PIXELS[:4, :4] if kind == "larger" else PIXELS
    for one, other in zip(edited(whole, image, n=2), edited(parts, image, n=2), strict=True):
        difference = abs(one.astype(int) - other)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # strips add in another order


def test_each_part_of_an_offloaded_replica_takes_its_turn(serve, monkeypatch):
    client = serve("plain", offload=True)
    model = client.loaded.model
    names = {id(model.denoiser): "denoiser", id(model.autoencoder): "autoencoder"}
    moves = []
    placed = torch.nn.Module.to

    def to(module, *args, **kwargs):
        moves.append((names.get(id(module), "text encoder"), str(args[0])))
        return placed(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(model.placement, "device", Labelled("cpu"))
    pictures_of(client.post("/v1/images/generations", json={"prompt": "a green triangle", "seed": 1}))
    there = set()
    for name, where in moves:
        if where == "there":
            assert not there, "one part at a time"
            there.add(name)
        else:
            there.discard(name)
    assert not there
    assert [name for name, where in moves if where == "there"] == ["text encoder", "denoiser", "autoencoder"]


class Labelled(str):
    """A device that says whose it is: parts that are moved to it are seen to be there."""

    def __str__(self) -> str:
        return "there"


def test_what_was_admitted_before_a_promotion_fits_or_is_refused(serve):
    plain, larger = serve("plain").loaded, serve("larger").loaded
    small = asked(small_HWC=PIXELS[:4, :4])
    ordinary = asked(picture_HWC=PIXELS, strength=0.5)
    refusal, drawn = plain.draw([small, ordinary])
    assert isinstance(refusal, RequestRefused) and refusal.param == "model" and drawn.pixels_HWC.shape == PIXELS.shape
    refusal, other, drawn = larger.draw([ordinary, asked(small_HWC=PIXELS[:2, :2]), small])
    assert isinstance(refusal, RequestRefused) and "4 times larger" in refusal.what
    assert isinstance(other, RequestRefused) and other.param == "image"
    assert drawn.pixels_HWC.shape == PIXELS.shape
