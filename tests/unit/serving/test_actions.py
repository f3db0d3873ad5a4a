"""`POST /v1/actions`: a policy behind the same front door; what it is told is checked by name before the sampler is asked."""

import dataclasses
import json

import numpy as np
import pytest

from latentray import build
from latentray.checkpoint import manifest
from latentray.conditioning.observations import Range
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError, RequestRefused
from latentray.inference import policy_folder
from latentray.inference.acting import ActionRequest, ActionSampler
from latentray.inference.model_folder import SamplingDefaults
from latentray.inference.requests import SamplingRequest
from serving import app, launch, loading
from serving.greeting import greeting
from serving.releases import find_release

NET = DenoiserConfig(
    family="policy", in_channels=2, out_channels=2, context_width=None, heads=None, groups=2, channels=[4, 8], kernel=3,
    action_steps=4, observation_steps=2, observation_width=5,
)  # fmt: skip
SEEN = {"arm": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], "goal": [[1.0, 2.0], [3.0, 4.0]]}


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("policy")
    (root / "built").mkdir()
    ranges = {
        name: Range(low=np.full(width, -1, np.float32), high=np.full(width, 5, np.float32))
        for name, width in (("actions", 2), ("obs.arm", 3), ("obs.goal", 2))
    }
    policy_folder.write(
        root / "built",
        config=NET,
        state=build.seeded(lambda: build.denoiser(NET), 1).state_dict(),
        objective=ObjectiveConfig(schedule="flow", prediction="flow"),
        defaults=SamplingDefaults(sampler="flow_euler", steps=4, guidance_scale=1.0),
        observations=("arm", "goal"),
        ranges=ranges,
        executed=3,
    )
    manifest.publish(root / "built", root / "model", kind="model")
    return str(root / "model")


@pytest.fixture
def loaded(release):
    """In place of the picture model that the other tests of this folder serve."""
    return loading.load(ServeConfig(release=release, allow_anonymous=True, device="cpu", threads=1), release, "p-1")


def ask(client, **changes):
    return client.post("/v1/actions", json={"observations": SEEN} | changes)


def test_the_actions_are_those_that_the_sampler_gives(client, release):
    answer = ask(client, seed=5)
    assert answer.status_code == 200
    body = answer.json()
    wanted = ActionSampler.load(release, device="cpu").act(
        [ActionRequest(observations={n: np.array(v) for n, v in SEEN.items()}, seed=5, sampler="flow_euler", steps=4)]
    )
    np.testing.assert_allclose(body["actions"], wanted[0], rtol=1e-6)
    assert np.shape(body["actions"]) == (4, 2) and body["executed"] == 3
    assert (body["seed"], body["sampler"], body["num_inference_steps"], body["model"]) == (5, "flow_euler", 4, "p-1")


def test_settings_are_the_requests_where_it_gives_them(client):
    body = ask(client, seed=5, sampler="flow_heun", num_inference_steps=2).json()
    assert (body["sampler"], body["num_inference_steps"]) == ("flow_heun", 2)
    assert body["actions"] != ask(client, seed=5).json()["actions"]
    first, other = (ask(client).json() for _ in range(2))
    assert first["seed"] != other["seed"] and first["actions"] != other["actions"]
    assert ask(client, seed=first["seed"]).json()["actions"] == first["actions"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"observations": {"arm": SEEN["arm"]}}, "observations.goal"),
        ({"observations": SEEN | {"eye": [[1.0]]}}, "observations.eye"),
        ({"observations": SEEN | {"arm": [[0.1, 0.2, 0.3]]}}, "observations.arm"),
        ({"observations": SEEN | {"arm": [[0.1, 0.2], [0.3, 0.4]]}}, "observations.arm"),
        ({"observations": SEEN | {"arm": [[0.1, 0.2, 0.3], [0.4, 0.5]]}}, "observations.arm"),
        ({"observations": SEEN | {"goal": [[1.0, "2"], [3.0, 4.0]]}}, "observations.goal.0.1"),
        ({"observations": 3}, "observations"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10_000}, "num_inference_steps"),
        ({"sampler": "ddim"}, "sampler"),
        ({"seed": -1}, "seed"),
        ({"prompt": "forward"}, "prompt"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(client, changes, param):
    answer = ask(client, **changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_numbers_that_are_none_are_refused(client):
    body = json.dumps({"observations": SEEN}).replace("0.1", "NaN")
    answer = client.post("/v1/actions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("observations")


def test_it_wants_a_key(anyone):
    assert ask(anyone).status_code == 401


@pytest.mark.parametrize("route", ["images", "videos"])
def test_a_policy_draws_nothing(client, route):
    answer = client.post(f"/v1/{route}/generations", json={"prompt": "a robot"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "model" and "/v1/actions" in answer.json()["error"]["message"]


def test_a_policy_changes_no_pictures(client):
    answer = client.post("/v1/images/edits", json={"image": "", "prompt": "a robot"})
    assert answer.status_code == 400 and "/v1/actions" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("setting", "value"), [("offload", True), ("compile", True), ("classifier", "runs/c"), ("text_precision", "bf16")]
)
def test_what_a_policy_has_no_use_for_is_refused_before_it_is_served(release, setting, value):
    config = ServeConfig(release=release, allow_anonymous=True, **{setting: value})
    for refuse in (
        lambda: loading.load(config, release, "p-1"),
        lambda: launch.serve(config),
        lambda: app.build({"release": release, "allow_anonymous": True, setting: value}),
    ):
        with pytest.raises(ConfigError, match="one small network") as caught:
            refuse()
        assert caught.value.where == setting


def test_the_model_says_what_it_is_told(client):
    (first, *_) = client.get("/v1/models").json()["data"]
    told = first["latentray"]
    assert told["observations"] == {"arm": 3, "goal": 2}
    assert (told["observation_steps"], told["action_steps"], told["action_width"], told["executed"]) == (2, 4, 2, 3)
    assert "size" not in told


def test_the_greeting_shows_the_route_that_it_answers(release):
    told = greeting("http://h", find_release(ServeConfig(release=release, allow_anonymous=True)), with_key=False)
    assert "/v1/actions" in told and "/v1/images" not in told


def test_it_warms_up_and_a_request_fails_for_its_own_faults_alone(loaded):
    loaded.warm_up()
    good = ActionRequest(observations={n: np.array(v) for n, v in SEEN.items()}, seed=1, sampler="flow_euler", steps=2)
    bad = dataclasses.replace(good, observations={"arm": np.zeros((2, 3))})
    picture = SamplingRequest(
        prompt="a", steps=2, guidance_scale=1.0, seed=0, sampler="flow_euler", height=64, width=64
    )
    plan, failed, refused, again = loaded.draw([good, bad, picture, good])
    np.testing.assert_allclose(plan.actions_TA, again.actions_TA, atol=1e-5)
    assert isinstance(failed, ValueError) and isinstance(refused, RequestRefused)
