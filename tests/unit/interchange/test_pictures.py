"""A model handed out draws in diffusers the picture that our sampler draws, from the same noise."""

import functools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from latentray import build, randomness
from latentray.checkpoint import manifest, weights
from latentray.conditioning import text, tiny_text_encoder
from latentray.conditioning.combination import combine
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.config.text_encoder import TinyTextEncoderConfig
from latentray.inference import model_folder
from latentray.inference.model_folder import SamplingDefaults
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.interchange import diffusers_folders, exporting, model_folders
from latentray.models import torchvision_ops
from latentray.models.autoencoder import LatentScale
from latentray.randomness import Purpose

torchvision_ops.ensure_importable()
import diffusers  # noqa: E402  (it imports torchvision)
from transformers import CLIPTokenizer  # noqa: E402

STEPS, SEED, SIZE = 7, 5, 32
PROMPT, NEGATIVE = "a red circle on white", "blue"
OTHERWISE = {
    "sd1_by_flow": ("sd1", ObjectiveConfig(schedule="flow", prediction="flow")),
    "sd3_discrete": ("sd3", ObjectiveConfig(prediction="v")),
}
"""Networks that nobody published a pipeline of: trained on another objective."""


@pytest.fixture(scope="module")
def drawn(pipeline_folder, tmp_path_factory):
    """name, sampler -> (our sampler, diffusers' pipeline loaded from what we wrote)."""
    root, models = tmp_path_factory.mktemp("pictures"), {}

    @functools.cache
    def load(name, sampler):
        if name not in models:
            published, objective = OTHERWISE.get(name, (name, None))
            pipeline = diffusers_folders.from_diffusers(str(pipeline_folder(published)))
            pipeline.objective = objective or pipeline.objective
            uri = str(root / name)
            defaults = SamplingDefaults(sampler=pipeline.solver.sampler, steps=STEPS, guidance_scale=3.0)
            model_folders.write(pipeline, uri, defaults=defaults, config={}, meta={})
            models[name] = uri, TextToImage(model_folder.load(uri), device="cpu", dtype=torch.float32)
        uri, ours = models[name]
        scratch, folder = root / f"{name}-{sampler}-read", root / f"{name}-{sampler}"
        scratch.mkdir()
        folder.mkdir()
        diffusers_folders.write(model_folders.read(uri, scratch)[1], folder, sampler=sampler)
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        theirs.set_progress_bar_config(disable=True)
        return ours, theirs

    return load


def request(sampler, **changes):
    values = dict(prompt=PROMPT, negative_prompt=NEGATIVE, steps=STEPS, guidance_scale=3.0, seed=SEED, sampler=sampler)
    return SamplingRequest(**(values | dict(height=SIZE, width=SIZE) | changes))


@torch.inference_mode()
def ours_in_floats(model, wanted):
    """The picture before it becomes bytes, (H, W, 3) in [0, 1]."""
    x = model.autoencoder.decode(model.model.scale.restore(model.latents([wanted])))
    return ((x.float().clamp(-1, 1) + 1) / 2)[0].permute(1, 2, 0).numpy()


def theirs_in_floats(pipeline, noise, **more):
    return by_plain_call(pipeline, noise, negative_prompt=NEGATIVE, **more)


def by_plain_call(pipeline, noise, **more):
    return pipeline(
        PROMPT, num_inference_steps=STEPS, guidance_scale=3.0, latents=noise, height=SIZE, width=SIZE,
        output_type="np", **more,
    ).images[0]  # fmt: skip


def first_noise(model):
    side = SIZE // model.downsampling
    shape = (model.autoencoder.config.latent_channels, side, side)
    return randomness.normal(randomness.keys_from_seeds([SEED], Purpose.INITIAL_LATENT), shape)


def noise_of(pipeline, model):
    noise = first_noise(model)
    pipeline.scheduler.set_timesteps(STEPS)
    start = float(getattr(pipeline.scheduler, "init_noise_sigma", 1.0))
    # diffusers' Euler schedulers start at sigma times what they get, and mean a state of variance 1 + sigma^2.
    return noise * (1.0 if start == 1 else math.hypot(1, start) / start)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("sd1", "ddim"), ("sd1", "dpmpp_2m"), ("sd1", "unipc"), ("sd1", "euler"), ("sd2", "ddim"), ("sdxl", "ddim"),
        ("sdxl", "euler"),
    ],
)  # fmt: skip
def test_the_same_noise_gives_the_same_picture(name, sampler, drawn):
    ours, theirs = drawn(name, sampler)
    mine = ours_in_floats(ours, request(sampler))
    other = theirs_in_floats(theirs, noise_of(theirs, ours))
    assert mine.std() > 0.05  # a picture, not a constant
    assert np.abs(mine - other).max() < 1e-4
    assert np.abs(ours.sample([request(sampler)])[0].pixels_HWC / 255 - other).max() < 1 / 255


@pytest.mark.parametrize(
    ("name", "sampler"), [("sd1", "ddim"), ("sd2", "ddim"), ("sdxl", "ddim"), ("sd3", "flow_euler")]
)
@pytest.mark.parametrize("prompt", [PROMPT, "", "Blue, unknown WÖRDS  " + "red " * 30])
def test_a_prompt_is_embedded_alike(name, sampler, prompt, drawn):
    ours, theirs = drawn(name, sampler)
    embedded = combine(ours.denoiser.config, [one.embed([prompt]) for one in ours.model.text_encoders])
    told = [None, None] if name == "sd3" else [] if name == "sdxl" else ["cpu", 1]
    more = {} if name.startswith("sd3") or name == "sdxl" else {"do_classifier_free_guidance": False}
    found = theirs.encode_prompt(prompt, *told, **more)
    torch.testing.assert_close(embedded.tokens_BLD, found[0], rtol=1e-4, atol=1e-5)
    if len(found) == 4:
        torch.testing.assert_close(embedded.pooled_BD, found[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun"])
def test_sd3_draws_the_same_picture_by_the_pipelines_plain_call(sampler, drawn):
    ours, theirs = drawn("sd3", sampler)
    assert ours.schedule.shift != 1
    mine = ours_in_floats(ours, request(sampler, spacing="sd3"))
    other = theirs_in_floats(theirs, noise_of(theirs, ours))
    assert mine.std() > 0.05
    assert np.abs(mine - other).max() < 1e-4


def test_sd3_draws_the_same_picture_over_the_levels_of_a_call(drawn):
    ours, theirs = drawn("sd3", "flow_euler")
    levels = [1 - step / STEPS for step in range(STEPS)]
    mine = ours_in_floats(ours, request("flow_euler", spacing="trailing"))
    other = theirs_in_floats(theirs, noise_of(theirs, ours), sigmas=levels)
    assert np.abs(mine - other).max() < 1e-4


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_sdxl_draws_the_same_picture_by_the_pipelines_plain_call(sampler, drawn):
    """Without a negative prompt, whose embeddings are zeros then: the tokens' and the pooled text's."""
    ours, theirs = drawn("sdxl", sampler)
    assert theirs.config.force_zeros_for_empty_prompt and ours.model.zero_when_empty
    mine = ours_in_floats(ours, request(sampler, negative_prompt=None))
    assert np.abs(mine - by_plain_call(theirs, noise_of(theirs, ours))).max() < 1e-4
    assert np.abs(mine - ours_in_floats(ours, request(sampler, negative_prompt=""))).max() > 1e-3


def test_sdxl_as_it_came_draws_the_same_picture_by_its_plain_call(pipeline_folder, drawn):
    """With its own scheduler and noise levels, nothing handed out."""
    ours, _ = drawn("sdxl", "euler")
    theirs = diffusers.DiffusionPipeline.from_pretrained(pipeline_folder("sdxl"))
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler.set_timesteps(STEPS)
    highest = float(theirs.scheduler.sigmas[0])
    start = first_noise(ours) * math.hypot(1, highest) / float(theirs.scheduler.init_noise_sigma)
    mine = ours_in_floats(ours, request("euler", negative_prompt=None, spacing="leading"))
    assert mine.std() > 0.05
    assert np.abs(mine - by_plain_call(theirs, start)).max() < 1e-3


def test_the_refiner_goes_on_from_the_base_alike(drawn):
    """Its last steps, on latents that a base stopped at; guidance leads it away from a low score, too."""
    ours, theirs = drawn("sdxl_refiner", "ddim")
    noise, start = first_noise(ours), STEPS - 3
    theirs.scheduler.set_timesteps(STEPS)
    share = 1 - float(theirs.scheduler.timesteps[start - 1] + theirs.scheduler.timesteps[start]) / 2 / 1000
    other = theirs(
        PROMPT, negative_prompt=NEGATIVE, image=noise, denoising_start=share, num_inference_steps=STEPS, guidance_scale=3.0,
        output_type="latent",
    ).images  # fmt: skip
    mine = ours.latents([request("ddim")], start=start, begin_with=noise)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    assert (mine - noise).abs().max() > 0.1


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_empty_negative_prompt_is_the_same_to_both(name, drawn):
    ours, theirs = drawn(name, "ddim")
    mine = ours_in_floats(ours, request("ddim", negative_prompt=""))
    other = by_plain_call(theirs, noise_of(theirs, ours), negative_prompt="")
    assert np.abs(mine - other).max() < 1e-4


def test_a_negative_prompt_that_is_not_given_is_the_empty_one_where_no_zeros_are_learnt(drawn):
    ours, theirs = drawn("sd1", "ddim")
    mine = ours_in_floats(ours, request("ddim", negative_prompt=None))
    assert np.array_equal(mine, ours_in_floats(ours, request("ddim", negative_prompt="")))
    assert np.abs(mine - by_plain_call(theirs, noise_of(theirs, ours))).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "sampler", "off"),
    [
        ("sd3_discrete", "ddim", 1e-4), ("sd3_discrete", "dpmpp_2m", 1e-4),
        ("sd1_by_flow", "dpmpp_2m", 5e-3),  # diffusers rounds the times it asks the network at
    ],
)  # fmt: skip
def test_a_network_of_another_objective_draws_the_same_picture(name, sampler, off, drawn):
    ours, theirs = drawn(name, sampler)
    mine = ours_in_floats(ours, request(sampler))
    assert mine.std() > 0.05
    assert np.abs(mine - theirs_in_floats(theirs, noise_of(theirs, ours))).max() < off


def test_the_tokenizers_handed_out_are_clips_with_and_without_tokenizer_json(drawn, tmp_path):
    _, theirs = drawn("sdxl", "ddim")
    for tokenizer, pad in ((theirs.tokenizer, "<|endoftext|>"), (theirs.tokenizer_2, "!")):
        assert isinstance(tokenizer, CLIPTokenizer)
        assert (tokenizer.pad_token, tokenizer.model_max_length) == (pad, 16)
    folder = Path(theirs.name_or_path) / "tokenizer_2"
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(folder / file, tmp_path / file)
    older = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in (PROMPT, "", "Red BLUE  circle!", "ünïcode"):
        assert older(prompt)["input_ids"] == theirs.tokenizer_2(prompt)["input_ids"]


def test_a_model_made_here_with_a_tokenizer_of_its_own_draws_the_same_picture(tmp_path):
    words = TinyTextEncoderConfig(width=16, layers=2, heads=2, max_tokens=8)
    tiny_text_encoder.write(tmp_path / "encoder", [PROMPT, NEGATIVE], words)
    autoencoder = AutoencoderConfig(channels=[8, 8], blocks=1, groups=4)
    denoiser = DenoiserConfig(channels=[8, 16], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4)
    weights.save(tmp_path / "vae.safetensors", build.seeded(lambda: build.autoencoder(autoencoder), 0).state_dict())
    (tmp_path / "files").mkdir()
    model_folder.write(
        tmp_path / "files",
        autoencoder_config=autoencoder,
        autoencoder_weights=tmp_path / "vae.safetensors",
        scale=LatentScale(shift=0.3, scale=2.0),  # measured: diffusers' pipeline knows no shift
        denoiser_config=denoiser,
        denoiser_state=build.seeded(lambda: build.denoiser(denoiser), 1).state_dict(),
        objective=ObjectiveConfig(schedule="cosine", prediction="v"),
        text_encoders=[text.load(str(tmp_path / "encoder"))],
        defaults=SamplingDefaults(sampler="ddim", steps=STEPS, guidance_scale=3.0),
        size=SIZE,
    )
    uri = str(tmp_path / "model")
    manifest.publish(tmp_path / "files", uri, kind="model")
    ours = TextToImage(model_folder.load(uri), device="cpu", dtype=torch.float32)
    theirs = diffusers.DiffusionPipeline.from_pretrained(exporting.to_diffusers(uri, str(tmp_path / "out")))
    theirs.set_progress_bar_config(disable=True)
    assert theirs.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert type(theirs.tokenizer).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    for prompt in (PROMPT, "Blue  BLUE, unseen wörds"):
        ids = [one(prompt)["input_ids"] for one in (theirs.tokenizer, ours.model.text_encoders[0].tokenizer)]
        assert ids[0] == ids[1]
        mine = ours_in_floats(ours, request("ddim", prompt=prompt))
        other = theirs(
            prompt, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=3.0,
            latents=noise_of(theirs, ours), output_type="np",
        ).images[0]  # fmt: skip
        assert mine.shape == other.shape == (SIZE, SIZE, 3)  # its own size, unasked
        assert np.abs(mine - other).max() < 1e-4
