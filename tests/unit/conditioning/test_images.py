"""The vision encoder: shown a picture as transformers' own processor shows it, and its tokens are the model's."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentray.conditioning import encoders, images
from latentray.conditioning.images import Preprocessing
from latentray.conditioning.text import Reading
from latentray.errors import ArtifactError
from latentray.models import torchvision_ops


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    return tmp_path_factory.mktemp("vision") / tiny.write_encoder(tmp_path_factory.mktemp("eye"), "clip_vision", 16)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoders.load(str(folder), name="eye", reading=Reading(kind="clip_vision"))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@settings(max_examples=10, deadline=None)
@given(height=st.integers(9, 90), width=st.integers(9, 90), crop=st.sampled_from([16, 24, 20]))
def test_a_picture_is_shown_as_the_published_processor_shows_it(tiny, height, width, crop):
    torchvision_ops.ensure_importable()
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    told = tiny.PREPROCESSOR | {"crop_size": {"height": crop, "width": crop}}
    x = picture(height, width, seed=height)
    expected = CLIPImageProcessorPil(**told)(Image.fromarray(x), return_tensors="np")["pixel_values"]
    ours = Preprocessing.of(told)
    got = ours.normalised(images.views_of([ours.view(x)]))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)


def test_tokens_are_the_models_own_patches(encoder, folder):
    import transformers

    model = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    views = images.views_of([encoder.preprocessing.view(picture(40, 30, seed=s)) for s in range(3)])
    out = model(pixel_values=encoder.preprocessing.normalised(views), output_hidden_states=True)
    embedded = encoder.embed(views)
    torch.testing.assert_close(embedded.tokens_BLD, out.last_hidden_state)
    torch.testing.assert_close(embedded.pooled_BD, out.image_embeds)
    assert embedded.tokens_BLD.shape == (3, 10, 16) and (encoder.max_tokens, encoder.width) == (10, 16)
    deeper = encoders.load(str(folder), name="eye", reading=Reading(kind="clip_vision", layer=2))
    torch.testing.assert_close(deeper.embed(views).tokens_BLD, out.hidden_states[-2])
    assert deeper.fingerprint != encoder.fingerprint
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_nothing_is_zeros_of_the_same_shape(encoder):
    nothing, one = encoder.nothing(), encoder.embed(images.views_of([picture(24, 24)]))
    for name in ("tokens_BLD", "mask_BL", "pooled_BD"):
        assert getattr(nothing, name).shape == getattr(one, name).shape
    assert not nothing.tokens_BLD.any() and nothing.mask_BL.all()


def test_weights_and_preprocessing_decide_the_fingerprint(encoder, folder, tmp_path):
    for name in images.FILES:
        copy = tmp_path / name.split(".")[0]
        shutil.copytree(folder, copy)
        data = bytearray((copy / name).read_bytes())
        place = data.rindex(b"0.26") + 3 if name == images.SETTINGS else len(data) - 9
        data[place] ^= 1
        (copy / name).write_bytes(bytes(data))
        decided = images._decides(copy, encoder.reading)
        assert decided != images._decides(folder, encoder.reading), name


def test_what_is_missing_or_of_another_kind_is_named(tiny, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / images.SETTINGS).unlink()
    reading = Reading(kind="clip_vision")
    with pytest.raises(ArtifactError, match="vision encoder lacks preprocessor_config.json"):
        encoders.load(str(tmp_path / "copy"), reading=reading)
    (tmp_path / "copy" / images.SETTINGS).write_text(json.dumps({"size": 32, "image_mean": [0, 0, 0]}))
    with pytest.raises(ArtifactError, match="image_std"):
        encoders.load(str(tmp_path / "copy"), reading=reading)
    (tmp_path / "copy" / images.SETTINGS).write_text(json.dumps(tiny.PREPROCESSOR | {"crop_size": 32}))
    with pytest.raises(ArtifactError, match="reads 24 pixels square, and is shown 32x32"):
        encoders.load(str(tmp_path / "copy"), reading=reading)
    with pytest.raises(ArtifactError, match="3th from the last"):
        encoders.load(str(folder), reading=Reading(kind="clip_vision", layer=3))
    with pytest.raises(ArtifactError):
        encoders.load(tiny.write_encoder(tmp_path / "text", "clip", 16), reading=reading)
