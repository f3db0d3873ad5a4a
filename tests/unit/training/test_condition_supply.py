"""Conditions of every kind, stored beside latents and made online: the same numbers, and refused where they do not fit."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from latentray.config import compose
from latentray.config.text_encoder import TextEncoderConfig
from latentray.config.train import Train
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.records import LatentBatch
from latentray.training import inputs as checks
from latentray.training import latent_supply

CPU = torch.device("cpu")
CLASSES = [f"class {number}" for number in range(3)]
SEVERAL = ("sdxl", "sd3", "picture", "text_and_picture", "learned")
DENOISERS = {
    "sdxl": ["denoiser=unet_tiny_sdxl"],
    "sd3": ["denoiser=mmdit_tiny_sd3"],
    "class": ["denoiser=unet_tiny_class", "denoiser.classes=3"],
    "picture": ["denoiser=unet_tiny_sd1"],
    "text_and_picture": ["denoiser=unet_tiny_sd1", "denoiser.combine=sequence"],
    "learned": ["denoiser=unet_tiny_sd1", "denoiser.context_layers=2", "denoiser.context_vocabulary=300"],
    "class_and_text": ["denoiser=unet_tiny_class", "denoiser.classes=3", "denoiser.context_width=16"],
}


@pytest.fixture(scope="module")
def made(tiny, inputs, tmp_path_factory) -> dict[str, dict]:
    """By kind: the encoders and `latents`, all of the same few pictures."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("conditions")
    data = {"data": tiny.write_pictures(root, "train", 16, classes=CLASSES).rpartition("/")[0]}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for kind in SEVERAL:
            encoders = tiny.write_encoders(root / kind, kind)
            written = tiny.write_latents(
                root / kind, patch, **data, autoencoder=inputs["autoencoder"], text_encoders=encoders
            )
            found[kind] = data | {"encoders": encoders, "latents": written}
    found["class"] = found["sdxl"] | {"encoders": []}
    found["class_and_text"] = found["sdxl"] | {"encoders": found["sdxl"]["encoders"][:1]}
    return found


def settings(tiny, kind: str, *overrides: str) -> list[str]:
    plain = [one for one in tiny.STAGE2 if not one.startswith("denoiser")]
    return [*plain, *DENOISERS[kind], *overrides]


@pytest.fixture(scope="module")
def stored(tiny, made):
    def load(kind: str, *overrides: str) -> Train:
        return compose.load("train", Train, settings(tiny, kind, f"latents={made[kind]['latents']}", *overrides))

    return load


@pytest.fixture(scope="module")
def online(tiny, made, inputs):
    def load(kind: str, *overrides: str, encoders: list[TextEncoderConfig] | None = None) -> Train:
        named = made[kind]["encoders"] if encoders is None else encoders
        listed = ",".join(map(tiny.listed, named))
        own = [
            "online.enabled=true", f"data={made[kind]['data']}", f"autoencoder_from={inputs['autoencoder']}",
            "online.batch_size=16", "online.text_dtype=float32", f"online.text_encoders=[{listed}]",
        ]  # fmt: skip
        return compose.load("train", Train, settings(tiny, kind, *own, *overrides))

    return load


def opened(config: Train, steps: int = 3) -> tuple[latent_supply.Space, list[LatentBatch]]:
    source = latent_supply.open_source(config, CPU)
    read = source.batches(source.feed.source(rank=0, world=1, first_step=0, last_step=steps))
    return source.space, [source.latents(batch) for batch in read]


@pytest.fixture(scope="module")
def both(stored, online):
    """Kind -> what the store gives, and what is made online: their spaces and first batches, once."""
    return functools.cache(lambda kind: (opened(stored(kind)), opened(online(kind))))


@pytest.mark.parametrize("kind", DENOISERS)
def test_online_conditions_are_the_stored_ones_bit_for_bit(both, made, kind):
    (_, from_store), (_, from_pictures) = both(kind)
    for one, other in zip(from_store, from_pictures, strict=True):
        assert one.ids == other.ids and torch.equal(one.mean_BChw, other.mean_BChw)
        assert torch.equal(one.given.labels_B, other.given.labels_B) and len(one.given.labels_B.unique()) > 1
        assert len(one.given.texts) == len(other.given.texts) == len(made[kind]["encoders"])
        for text, again in zip(one.given.texts, other.given.texts, strict=True):
            for name in ("tokens_BLD", "mask_BL", "pooled_BD"):
                assert torch.equal(getattr(text, name), getattr(again, name)), name
            assert len(text.tokens_BLD.flatten(1).unique(dim=0)) > 1  # they tell samples apart


@pytest.mark.parametrize("kind", DENOISERS)
def test_both_say_the_same_of_their_encoders_and_of_what_is_left_out(both, kind):
    (one, _), (other, _) = both(kind)
    assert one.facts == other.facts and one.texts == other.texts
    for text, again in zip(one.empty.texts, other.empty.texts, strict=True):
        assert torch.equal(text.tokens_BLD, again.tokens_BLD) and torch.equal(text.pooled_BD, again.pooled_BD)


def test_zeros_for_dropped_captions_come_from_either_source(stored, online, both):
    for load, (plain, _) in zip((stored, online), both("sdxl"), strict=True):
        space = latent_supply.open_source(load("sdxl", "stage.zero_when_dropped=true"), CPU).space
        assert (plain.zero_when_empty, space.zero_when_empty) == (False, True)
        assert all(one.tokens_BLD.any() for one in plain.empty.texts)
        assert not any(one.tokens_BLD.any() or one.pooled_BD.any() for one in space.empty.texts)
        assert [one.tokens_BLD.shape for one in space.empty.texts] == [
            one.tokens_BLD.shape for one in plain.empty.texts
        ]


@pytest.mark.parametrize("kind", ["learned", "class"])
def test_zeros_stand_for_no_caption_that_is_not_embedded(stored, kind):
    with pytest.raises(ConfigError) as caught:
        stored(kind, "stage.zero_when_dropped=true")
    assert caught.value.where == "stage.zero_when_dropped"


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_fitting_denoiser_is_taken_and_its_encoders_are_lineage(stored, online, made, kind):
    assert checks.check(stored(kind), 1).keys() == {"latents", "autoencoder"}
    names = [f"text_encoder.{one.name}" if i else "text_encoder" for i, one in enumerate(made[kind]["encoders"])]
    assert checks.check(online(kind), 1).keys() == {"dataset", "autoencoder", *names}


@pytest.mark.parametrize(
    ("kind", "overrides", "where", "told"),
    [
        ("sdxl", ["denoiser.context_width=16"], "denoiser.context_width", "32"),
        ("sdxl", ["denoiser.pooled_width=32"], "denoiser.pooled_width", "16"),
        ("sdxl", ["denoiser.combine=sd3"], "denoiser.combine", "text_encoders"),
        ("learned", ["denoiser.context_layers=0"], "denoiser.context_layers", "context_vocabulary"),
        ("learned", ["denoiser.context_vocabulary=299"], "denoiser.context_vocabulary", "300"),
        ("learned", ["denoiser.context_tokens=9"], "denoiser.context_tokens", "10"),
        (
            "picture",
            ["denoiser.context_layers=1", "denoiser.context_vocabulary=9"],
            "denoiser.context_layers",
            "tokens",
        ),
        ("sd3", ["denoiser.context_width=32"], "denoiser.context_width", "48"),
        ("sd3", ["denoiser.pooled_width=16"], "denoiser.pooled_width", "32"),
    ],
)
def test_encoders_that_do_not_fit_the_denoiser_are_refused_from_either_source(
    stored, online, kind, overrides, where, told
):
    for load in (stored, online):
        with pytest.raises(ConfigError) as caught:
            checks.check(load(kind, *overrides), 1)
        assert caught.value.where == where
        assert told in caught.value.mend


def test_a_run_does_not_go_on_with_another_set_of_encoders(online, made, tiny, tmp_path):
    cursor = latent_supply.open_source(online("sdxl"), CPU).feed.order.cursor(2)
    first, second = made["sdxl"]["encoders"]
    other = tiny.write_encoder(Path(tmp_path) / "other", "clip_projection", 16, seed=9)
    changed = TextEncoderConfig(name=second.name, kind=second.kind, layer=2, source=other)
    shallower = TextEncoderConfig(name=second.name, kind=second.kind, layer=1, source=second.source)
    for encoders in ([first, changed], [first, shallower], [second, first]):
        with pytest.raises(FingerprintMismatch):
            latent_supply.open_source(online("sdxl", encoders=encoders), CPU).feed.resumed(cursor)
    latent_supply.open_source(online("sdxl"), CPU).feed.resumed(cursor)


@pytest.mark.parametrize("kind", ["class", "class_and_text"])
def test_a_model_of_classes_needs_no_text_and_may_read_some(stored, online, both, kind):
    for load, (space, _) in zip((stored, online), both(kind), strict=True):
        checks.check(load(kind), 1)
        assert space.classes == tuple(CLASSES) and space.empty.labels_B.tolist() == [3]
        assert len(space.texts) == (kind == "class_and_text")


def test_labels_that_do_not_fit_are_refused_before_a_worker_starts(stored, online, inputs):
    for load in (stored, online):
        with pytest.raises(ConfigError, match="label 2") as caught:
            checks.check(load("class", "denoiser.classes=2"), 1)
        assert caught.value.where == "denoiser.classes"
    unlabelled = stored("class", f"latents={inputs['latents']}"), online("class", f"data={inputs['data']}")
    for config in unlabelled:
        with pytest.raises(ConfigError, match="no class labels"):
            checks.check(config, 1)


def test_what_a_vision_encoder_sees_is_the_whole_picture_whatever_is_cut_of_it(both, online):
    _, (space, whole) = both("picture")
    _, varied = opened(online("picture", "online.crop=random", "online.flip=true", "size=32"))
    for one, other in zip(whole, varied, strict=True):
        assert one.mean_BChw.shape != other.mean_BChw.shape
        assert torch.equal(one.given.texts[0].tokens_BLD, other.given.texts[0].tokens_BLD)
    (nothing,) = space.empty.texts
    assert nothing.tokens_BLD.shape == (1, 10, 16) and not nothing.tokens_BLD.any() and not nothing.pooled_BD.any()


def test_token_numbers_are_never_rounded(both):
    """In float16, as embeddings are stored by default, numbers above 2048 would run into each other."""
    (_, (batch, *_)), _ = both("learned")
    tokens = batch.given.texts[0].tokens_BLD
    assert tokens.dtype == torch.int32 and tokens.shape[1:] == (10, 1)
    assert batch.given.to("cpu", torch.bfloat16).texts[0].tokens_BLD.dtype == torch.int32
