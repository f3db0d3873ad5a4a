"""Picture-to-picture, inpainting, guidance settings and the hand-over to a refiner, on small random networks."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.inference import refinement
from latentray.inference.sampling import SamplingRequest

V = ObjectiveConfig(prediction="v")
FLOW = ObjectiveConfig(schedule="flow", prediction="flow")
MASKED = DenoiserConfig(in_channels=9, channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4)


@pytest.fixture(scope="module")
def model(load):
    return load(V)


@pytest.fixture(scope="module")
def flow(load):
    return load(FLOW, sampler="flow_euler")


def request(**changes) -> SamplingRequest:
    values = dict(prompt="a red circle", steps=10, guidance_scale=2.0, seed=1, sampler="ddim", height=16, width=16)
    return SamplingRequest(**(values | changes))


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def left_half() -> np.ndarray:
    mask = np.zeros((16, 16), dtype=bool)
    mask[:, :8] = True
    return mask


def test_less_strength_stays_nearer_to_the_picture(model):
    given = picture()
    start = model.encode(given)
    strengths = (0.1, 0.5, 1.0)
    z = model.latents([request(picture_HWC=given, strength=s) for s in strengths])
    distances = [float((one - start).square().mean()) for one in z]
    assert distances == sorted(distances)
    assert torch.allclose(z[2], model.latents([request()])[0], atol=1e-4)  # at full strength nothing of it remains


def test_a_start_in_the_middle_is_the_noised_picture(model):
    seen = []
    handle = model.denoiser.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), args[1].clone())))
    try:
        model.latents([request(picture_HWC=picture(), strength=0.3, guidance_scale=1.0)])
    finally:
        handle.remove()
    assert len(seen) == 3  # three of ten steps
    x, t = seen[0]
    alpha, sigma = model.schedule.alpha_sigma(t.long())
    noise = (x[0] - float(alpha) * model.encode(picture())) / float(sigma)
    assert abs(float(noise.mean())) < 0.2 and float(noise.std()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "heun", "unipc", "ddpm"])
def test_inpainting_keeps_every_pixel_outside_the_mask(model, sampler):
    given, mask = picture(), left_half()
    edited, plain = model.sample([request(picture_HWC=given, mask_HW=mask, sampler=sampler), request(sampler=sampler)])
    assert np.array_equal(edited.pixels_HWC[~mask], given[~mask])
    assert not np.array_equal(edited.pixels_HWC[mask], given[mask])
    assert not np.array_equal(edited.pixels_HWC, plain.pixels_HWC)


def test_the_known_part_of_the_latent_is_the_picture_s(model):
    z = model.latents([request(picture_HWC=picture(), mask_HW=left_half())])[0]
    assert torch.allclose(z[:, :, 4:], model.encode(picture())[:, :, 4:], atol=1e-6)
    assert not torch.allclose(z[:, :, :4], model.encode(picture())[:, :, :4], atol=0.1)


def test_a_nine_channel_model_sees_mask_and_masked_picture(load):
    inpainter = load(V, denoiser=MASKED)
    assert inpainter.takes_mask
    seen = []
    handle = inpainter.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        edited, plain = inpainter.sample([request(picture_HWC=picture(), mask_HW=left_half()), request()])
    finally:
        handle.remove()
    x = seen[0][:2]  # the unconditional half of the batch; both halves see the same channels
    assert x.shape[1] == 9
    assert torch.equal(x[0, 4], torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1))
    assert torch.allclose(x[0, 5:], inpainter.encode(picture(), left_half()), atol=1e-6)
    assert bool((x[1, 4] == 1).all())  # without a mask everything is painted
    assert np.array_equal(edited.pixels_HWC[~left_half()], picture()[~left_half()])
    assert plain.pixels_HWC.shape == (16, 16, 3)


def test_an_edit_does_not_touch_its_neighbours(model):
    edit = request(picture_HWC=picture(), mask_HW=left_half(), sampler="dpmpp_2m", steps=7)
    late = request(picture_HWC=picture(), strength=0.4, sampler="unipc")
    alone = [model.latents([one])[0] for one in (edit, late, request())]
    together = model.latents([edit, late, request()])
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_guidance_outside_its_interval_costs_one_pass(model):
    sizes = []
    handle = model.denoiser.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    try:
        model.latents([request(guidance_interval=(0.5, 2.0))])
    finally:
        handle.remove()
    assert set(sizes) == {1, 2} and len(sizes) == 10
    everywhere = model.latents([request()])
    assert torch.equal(model.latents([request(guidance_interval=(0.0, math.inf))]), everywhere)
    nowhere = model.latents([request(guidance_interval=(1e6, math.inf))])
    assert torch.equal(nowhere, model.latents([request(guidance_scale=1.0)]))


@pytest.mark.parametrize(
    "change", [{"guidance_rescale": 0.7}, {"bound": "clamp"}, {"bound": "threshold", "quantile": 0.5}]
)
def test_each_remedy_changes_the_picture(model, change):
    plain = model.latents([request(guidance_scale=8.0)])
    assert not torch.allclose(model.latents([request(guidance_scale=8.0, **change)]), plain, atol=1e-3)


def test_the_shift_for_another_size_is_for_flow_and_for_that_size(flow):
    wide = dict(sampler="flow_euler", width=32, height=32)
    assert not torch.equal(flow.latents([request(**wide)]), flow.latents([request(**wide, resolution_shift=True)]))
    native = dict(sampler="flow_euler")
    assert torch.equal(flow.latents([request(**native)]), flow.latents([request(**native, resolution_shift=True)]))
    (warned,) = flow.sample([request(**wide)])
    assert "32x32 is not the trained 16x16" in warned.warnings[0] and "resolution_shift" in warned.warnings[0]
    assert flow.sample([request(**native)])[0].warnings == ()


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun"])
def test_a_model_that_hands_over_to_itself_draws_what_it_draws_alone(flow, sampler):
    asked = [request(sampler=sampler), request(sampler=sampler, seed=2, guidance_scale=1.0)]
    assert torch.allclose(refinement.latents(flow, flow, asked, at=0.35), flow.latents(asked), atol=1e-5)


def test_a_hand_over_goes_on_with_the_noise_of_its_own_rows(model):
    asked = [request(sampler="ddpm"), request(sampler="ddpm", seed=2)]
    whole = model.latents(asked)
    assert torch.allclose(refinement.latents(model, model, asked, at=0.5), whole, atol=1e-5)
    assert not torch.allclose(model.latents([request()]), whole[:1], atol=1e-2)  # the sampler does draw noise


def test_a_refiner_takes_no_edit(flow):
    with pytest.raises(ConfigError) as caught:
        refinement.latents(flow, flow, [request(sampler="flow_euler", picture_HWC=picture())], at=0.35)
    assert caught.value.where == "picture"


def test_requests_that_share_a_picture_encode_it_once(model):
    given, mask, calls = picture(), left_half(), []
    handle = model.autoencoder.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        model.latents([request(picture_HWC=given, mask_HW=mask, seed=i, steps=2) for i in range(3)])
    finally:
        handle.remove()
    assert len(calls) == 1


def test_the_refiner_sees_only_the_low_noise(load, flow):
    refiner = load(FLOW, seed=7, sampler="flow_euler")
    seen = {"base": [], "refiner": []}
    handles = [
        one.denoiser.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(float(args[1][0])))
        for name, one in (("base", flow), ("refiner", refiner))
    ]
    try:
        refinement.latents(flow, refiner, [request(sampler="flow_euler")], at=0.35)
    finally:
        for handle in handles:
            handle.remove()
    assert min(seen["base"]) > 350 >= max(seen["refiner"])
    assert len(seen["base"]) + len(seen["refiner"]) == 10


def test_a_hand_over_that_cannot_be_is_refused(load, model, flow):
    with pytest.raises(FingerprintMismatch):
        refinement.latents(model, flow, [request()], at=0.3)
    for at in (0.0, 1.0):
        with pytest.raises(ConfigError) as caught:
            refinement.latents(flow, flow, [request(sampler="flow_euler")], at=at)
        assert caught.value.where == "at"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_rescale": 1.5}, "guidance_rescale"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval"),
        ({"strength": 0.5}, "picture"),
        ({"mask_HW": np.ones((16, 16), bool)}, "picture"),
        ({"picture_HWC": np.zeros((8, 16, 3), np.uint8)}, "picture"),
        ({"picture_HWC": np.zeros((16, 16, 3), np.uint8), "mask_HW": np.ones((8, 8), bool)}, "mask"),
        ({"picture_HWC": np.zeros((16, 16, 3), np.uint8), "strength": 0.0}, "strength"),
        ({"eta": 1.5}, "eta"),
        ({"order": 4}, "order"),
        ({"spacing": "sideways"}, "spacing"),
        ({"bound": "soft"}, "bound"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"sampler": "flow_euler"}, "sampler"),
    ],
)
def test_a_request_out_of_bounds_is_refused_by_its_field_before_a_network_call(model, change, where):
    called = []
    handle = model.denoiser.register_forward_pre_hook(lambda *_: called.append(1))
    try:
        with pytest.raises(ConfigError) as caught:
            model.sample([dataclasses.replace(request(), **change)])
    finally:
        handle.remove()
    assert caught.value.where == where and isinstance(caught.value, ValueError)
    assert not called
