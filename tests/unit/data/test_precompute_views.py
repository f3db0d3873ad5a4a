"""What vision encoders and labels add to latents: stored per picture, copied with it, and told again where only words changed."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from latent_stores import records, write_data
from PIL import Image

from latentray.conditioning import encoders, images
from latentray.conditioning.text import Reading
from latentray.config.precompute_latents import ClipConfig, PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import latents, precompute, shards, synthetic_clips
from latentray.data.latent_batches import latent_batches
from latentray.data.ordering import Order
from latentray.data.pipeline import OrderedSource
from latentray.errors import ConfigError

N = 6


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (64, 80, 3), dtype=np.uint8)


def sample(number: int, captions: list[str], label: int | None) -> shards.Sample:
    buffer = io.BytesIO()
    Image.fromarray(pixels(number)).save(buffer, "PNG")
    data = buffer.getvalue()
    columns = {"sha256": hashlib.sha256(data).digest(), "width": 80, "height": 64, "label": label}
    return shards.Sample(
        key=f"{number:09d}", members={"png": data, "json": json.dumps({"captions": captions}).encode()}, columns=columns
    )


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("views")
    clip, eye = tiny.write_encoders(root / "encoders", "text_and_picture")
    return {
        "data": write_data(root / "data", [sample(i, [f"a {i}", f"b {i}"], i % 3) for i in range(N)], 4),
        "autoencoder_from": tiny.write_autoencoder(str(root / "autoencoder")),
        "text_encoders": [clip, eye],
    }


def config(made, out, **changes) -> PrecomputeLatents:
    values = made | {"out": str(out), "batch_size": 4, "text_dtype": "float32", "device": "cpu"}
    return PrecomputeLatents(**(values | changes))


def embedded(made, numbers):
    eye = made["text_encoders"][1]
    encoder = encoders.load(eye.source, name="eye", reading=Reading(kind=eye.kind, layer=eye.layer))
    return encoder.embed(images.views_of([encoder.preprocessing.view(pixels(n)) for n in numbers]))


def test_a_record_holds_what_the_encoder_sees_of_the_whole_picture_once(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path / "out", flip_variants=True, crops=2))
    found, expected = records(uri), embedded(made, range(N))
    assert len(found) == 4 * N
    for number in range(N):
        for variant in range(4):
            record = found[f"{number:09d}_{variant}"]["latent.safetensors"]
            assert record["text.clip.tokens"].shape == (2, 12, 16)  # of two captions
            torch.testing.assert_close(record["image.eye.tokens"], expected.tokens_BLD[number])
            torch.testing.assert_close(record["image.eye.pooled"], expected.pooled_BD[number])
            assert record["image.eye.mask"].all() and found[f"{number:09d}_{variant}"]["json"]["label"] == number % 3
    described = latents.describe(uri)
    assert [(one.name, one.record) for one in described.texts] == [("clip", "text.clip"), ("eye", "image.eye")]
    words, nothing = described.empty_prompts(described.texts)
    assert words.tokens_BLD.any() and not nothing.tokens_BLD.any() and nothing.tokens_BLD.shape == (1, 10, 16)


def test_a_batch_draws_among_captions_and_takes_the_picture_as_it_is(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path / "out"))
    opened = shards.IndexedShards.open(uri, kind="latents")
    source = OrderedSource([opened], Order.of(N, 0, N, digest=opened.digest), last_step=1)
    (batch,) = latent_batches(source, encoders=["eye", "clip"])
    numbers = [one.index for one in batch.ids]
    torch.testing.assert_close(batch.given.texts[0].tokens_BLD, embedded(made, numbers).tokens_BLD)
    assert batch.given.texts[1].tokens_BLD.shape == (N, 12, 16)
    assert batch.given.labels_B.tolist() == [number % 3 for number in numbers]


def test_new_words_and_labels_for_known_pictures_are_told_without_looking_again(
    made, tmp_path, in_process, monkeypatch
):
    precompute.precompute(config(made, tmp_path / "old"))
    renamed = [sample(i, [f"new {i}"] if i < 3 else [f"a {i}", f"b {i}"], None if i == 5 else 7) for i in range(N)]
    changed = made | {"data": write_data(tmp_path / "data", renamed, 4)}
    monkeypatch.setattr("latentray.data.decode.decode_at_least", lambda *a, **k: pytest.fail("a picture was decoded"))
    (uri,) = precompute.precompute(config(changed, tmp_path / "new", reuse=str(tmp_path / "old")))
    found, expected = records(uri), embedded(made, range(N))
    for number in range(N):
        one = found[f"{number:09d}_0"]
        torch.testing.assert_close(one["latent.safetensors"]["image.eye.tokens"], expected.tokens_BLD[number])
        assert one["json"].get("label") == (None if number == 5 else 7)
    meta = latents.describe(uri).listing.meta
    assert (meta["encoded"], meta["captioned"], meta["copied"]) == (0, 3, 3)
    opened = shards.IndexedShards.open(uri, kind="latents")
    assert opened.index.numbers("label").tolist() == [7, 7, 7, 7, 7, -1]


def test_clips_have_no_picture_for_a_vision_encoder(made, tmp_path, in_process):
    clips = list(synthetic_clips.samples("train", seed=0, first=0, count=2, frames=4, fps=8.0, form="frames"))
    given = made | {"data": write_data(tmp_path / "data", clips, 4), "clip": ClipConfig(frames=2, fps=8.0)}
    with pytest.raises(ConfigError) as caught:
        precompute.precompute(config(given, tmp_path / "out"))
    assert caught.value.where == "text_encoders" and "eye" in caught.value.mend


def test_a_kind_that_there_is_not_and_a_name_twice_are_refused():
    with pytest.raises(ConfigError, match="clip_visions"):
        TextEncoderConfig(kind="clip_visions")
    with pytest.raises(ConfigError, match="number of tokens"):
        TextEncoderConfig(kind="clip_vision", max_tokens=5)
