"""A policy's folder there and back, and its actions: exact against a known law, alike in any batch, in the data's units."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest
from latentray.conditioning.observations import Range
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.errors import ArtifactError, ConfigError, DigestMismatch
from latentray.inference import model_folder, policy_folder
from latentray.inference.acting import ActionRequest, ActionSampler
from latentray.inference.model_folder import SamplingDefaults

NET = DenoiserConfig(
    family="policy", in_channels=2, out_channels=2, context_width=None, heads=None, groups=2, channels=[4, 8], kernel=3,
    action_steps=4, observation_steps=2, observation_width=5,
)  # fmt: skip
FLOW = ObjectiveConfig(schedule="flow", prediction="flow")
RANGES = {
    "actions": Range(low=np.array([-1, 10], np.float32), high=np.array([1, 30], np.float32)),
    "obs.arm": Range(low=np.zeros(3, np.float32), high=np.full(3, 2, np.float32)),
    "obs.goal": Range(low=np.full(2, -5, np.float32), high=np.full(2, 5, np.float32)),
}


@pytest.fixture
def write(tmp_path):
    """(objective, sampler, steps) -> the URI of a policy's model folder."""

    def write(objective=FLOW, sampler="flow_euler", steps=4) -> str:
        folder = tmp_path / f"built-{objective.schedule}"
        folder.mkdir()
        policy_folder.write(
            folder,
            config=NET,
            state=build.seeded(lambda: build.denoiser(NET), 1).state_dict(),
            objective=objective,
            defaults=SamplingDefaults(sampler=sampler, steps=steps, guidance_scale=1.0),
            observations=("arm", "goal"),
            ranges=RANGES,
            executed=3,
        )
        manifest.publish(folder, tmp_path / objective.schedule, kind="model")
        return str(tmp_path / objective.schedule)

    return write


def request(number: int = 0, **changes) -> ActionRequest:
    generator = np.random.default_rng(number)
    seen = {"goal": generator.uniform(-5, 5, (2, 2)), "arm": generator.uniform(0, 2, (2, 3))}
    return ActionRequest(**({"observations": seen, "seed": number, "sampler": "flow_euler", "steps": 4} | changes))


class Law(torch.nn.Module):
    """The exact velocity of flow for actions that are surely `mean` of what is seen: noise - x_0 = (x - x_0) / t."""

    def forward(self, x_BTA, t_B, context=None, *, observations):
        x0 = observations[:, -1, None, :2].expand_as(x_BTA)
        return (x_BTA - x0) / (t_B / 1000).to(x_BTA)[:, None, None]


def test_a_folder_comes_back_as_it_was(write):
    uri = write()
    found = policy_folder.load(uri)
    assert found.config == NET and found.objective == FLOW and found.executed == 3
    assert found.observations == ("arm", "goal") and found.widths == {"arm": 3, "goal": 2}
    assert all(np.array_equal(found.ranges[name].low, one.low) for name, one in RANGES.items())
    assert all(np.array_equal(found.ranges[name].high, one.high) for name, one in RANGES.items())
    wanted = build.seeded(lambda: build.denoiser(NET), 1).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found.denoiser.state_dict().items())
    assert policy_folder.is_policy(uri)


def test_a_flipped_bit_is_refused(write):
    uri = write()
    path = f"{uri}/denoiser.safetensors"
    with open(path, "r+b") as file:
        file.seek(-5, 2)
        last = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(DigestMismatch, match="denoiser.safetensors"):
        policy_folder.load(uri)


def test_a_policy_is_no_picture_model_and_a_picture_model_no_policy(write, write_model):
    with pytest.raises(ArtifactError, match="gives actions"):
        model_folder.load(write())
    pictures = write_model(FLOW, sampler="flow_euler")
    assert not policy_folder.is_policy(pictures)
    with pytest.raises(ArtifactError, match="draws pictures"):
        policy_folder.load(pictures)


def test_another_format_is_refused(write, tmp_path):
    uri = write()
    folder = tmp_path / "later"
    folder.mkdir()
    for name in ("config.json", "denoiser.safetensors"):
        (folder / name).write_bytes(Path(uri, name).read_bytes())
    described = json.loads((folder / "config.json").read_text()) | {"format": 99}
    (folder / "config.json").write_text(json.dumps(described))
    manifest.publish(folder, tmp_path / "newer", kind="model")
    with pytest.raises(ArtifactError, match="format 99"):
        policy_folder.load(str(tmp_path / "newer"))


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun", "dpmpp_2m", "unipc"])
def test_each_sampler_draws_a_known_law_exactly_in_the_datas_units(write, sampler):
    model = ActionSampler.load(write(), device="cpu")
    model.denoiser = Law()
    requests = [request(seed, sampler=sampler) for seed in range(3)]
    for one, actions in zip(requests, model.act(requests), strict=True):
        told = RANGES["obs.arm"].normalised(one.observations["arm"])[-1, :2]  # the first two numbers it is told
        wanted = RANGES["actions"].restored(np.clip(np.tile(told, (4, 1)), -1, 1))
        assert actions.shape == (4, 2) and actions.dtype == np.float32
        np.testing.assert_allclose(actions, wanted, atol=1e-4)


def test_a_request_has_the_same_actions_in_any_batch(write):
    model = ActionSampler.load(write(), device="cpu")
    mixed = [request(0), request(1, sampler="unipc", steps=7), request(2, steps=2), request(3, sampler="flow_heun")]
    together = model.act(mixed)
    for one, actions in zip(mixed, together, strict=True):
        np.testing.assert_allclose(model.act([one])[0], actions, atol=2e-5)
    assert not np.allclose(model.act([request(0, seed=9)])[0], together[0])
    np.testing.assert_array_equal(model.act([request(0)])[0], model.act([request(0)])[0])


def test_the_ancestral_noise_is_the_requests_own(write):
    model = ActionSampler.load(write(ObjectiveConfig(schedule="cosine", timesteps=100), "ddpm", 5), device="cpu")
    one = request(4, sampler="ddpm", steps=5)
    beside = model.act([request(1, sampler="ddpm", steps=3), one])[1]
    np.testing.assert_allclose(model.act([one])[0], beside, atol=2e-4)


def test_a_regression_begins_with_zeros_and_takes_no_notice_of_the_seed(write):
    model = ActionSampler.load(write(ObjectiveConfig(schedule="unnoised", prediction="x0"), "direct", 1), device="cpu")
    assert model.samplers == ("direct",) and model.max_steps == 1
    first, other = (model.act([request(0, seed=s, sampler="direct", steps=1)])[0] for s in (0, 1))
    np.testing.assert_array_equal(first, other)
    seen = torch.from_numpy(
        np.concatenate([RANGES[f"obs.{n}"].normalised(request(0).observations[n]) for n in ("arm", "goal")], axis=1)[
            None
        ]
    )
    with torch.no_grad():
        y = model.denoiser(torch.zeros(1, 4, 2), torch.zeros(1), observations=seen)[0].numpy()
    np.testing.assert_allclose(first, RANGES["actions"].restored(np.clip(y, -1, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("seen", "where"),
    [
        ({"arm": np.zeros((2, 3))}, "observations.goal"),
        ({"arm": np.zeros((2, 3)), "goal": np.zeros((2, 2)), "eye": np.zeros(1)}, "observations.eye"),
        ({"arm": np.zeros((2, 4)), "goal": np.zeros((2, 2))}, "observations.arm"),
        ({"arm": np.zeros((3, 3)), "goal": np.zeros((2, 2))}, "observations.arm"),
        ({"arm": np.zeros((2, 3)), "goal": np.full((2, 2), np.nan)}, "observations.goal"),
    ],
)
def test_observations_that_do_not_fit_are_refused_by_name(write, seen, where):
    model = ActionSampler.load(write(), device="cpu")
    for call in (model.check, lambda one: model.act([one])):
        with pytest.raises(ConfigError) as caught:
            call(request(observations=seen))
        assert caught.value.where == where


def test_a_sampler_of_another_schedule_is_refused(write):
    with pytest.raises(ConfigError) as caught:
        ActionSampler.load(write(), device="cpu").check(request(sampler="ddim"))
    assert caught.value.where == "sampler"
