"""The application as Serve config files name it, and what its processes may import."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError, EnvironmentRefused, InputMissing
from serving import app, keys
from serving.greeting import greeting
from serving.launch import base_url, deploy_schema, require_free_port
from serving.releases import Release, find_release

ROOT = Path(__file__).resolve().parents[3]
FORBIDDEN = ("latentray.training", "deepspeed", "wandb", "lpips", "torch", "hydra", "latentray.data")


def test_the_serving_processes_import_neither_training_nor_torch():
    code = "import sys, serving.app; print(*sorted(sys.modules), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'platform'}", "PATH": "", "HOME": "/nonexistent"},
        timeout=120,
        check=True,
    )
    found = {name for name in done.stdout.split() if any(name == f or name.startswith(f + ".") for f in FORBIDDEN)}
    assert not found


@pytest.fixture
def release(tmp_path) -> str:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    manifest.publish(tmp_path / "source", tmp_path / "releases" / "r-7", kind="release")
    return str(tmp_path / "releases" / "r-7")


def test_build_makes_both_deployments_with_the_settings(release):
    args = {
        "release": release,
        "key_hashes": [keys.hash_of("k")],
        "max_replicas": 3,
        "max_batch_size": 6,
        "num_gpus": 1,
        "offload": True,
    }
    ingress = app.build(args)._bound_deployment
    sampler = ingress.init_args[2]._bound_deployment
    assert (ingress.name, sampler.name) == ("Ingress", "Sampler")
    assert sampler.user_config == {"release": release, "release_id": "r-7"}
    assert sampler.max_ongoing_requests == 12 and sampler.max_queued_requests == 32
    assert sampler._deployment_config.autoscaling_config.max_replicas == 3
    assert sampler.ray_actor_options["num_gpus"] == 1
    assert sampler.init_args[0].offload


def test_build_refuses_what_cannot_be_served(release, tmp_path):
    with pytest.raises(EnvironmentRefused, match="no API key"):
        app.build({"release": release})
    with pytest.raises(EnvironmentRefused, match="reachable"):
        app.build({"release": release, "allow_anonymous": True, "host": "0.0.0.0"})
    known = {"key_hashes": [keys.hash_of("k")]}
    with pytest.raises(ConfigError, match="max_bach_size"):
        app.build(known | {"release": release, "max_bach_size": 2})
    with pytest.raises(ConfigError, match="max_n"):
        app.build(known | {"release": release, "max_n": "many"})
    with pytest.raises(ConfigError, match="No release is named"):
        app.build(known)
    with pytest.raises(InputMissing):
        app.build(known | {"release": str(tmp_path / "nothing")})


def test_a_promotion_changes_user_config_alone(release):
    config = ServeConfig(release=release, allow_anonymous=True)
    first, second = Release(id="r-7", uri=release), Release(id="r-8", uri="s3://m/releases/r-8")
    before, after = (deploy_schema(config, first=first, release=r) for r in (first, second))
    assert ServeDeploySchema.model_validate(after).applications[0].deployments[0].user_config == second.user_config()
    after["applications"][0]["deployments"] = before["applications"][0]["deployments"]
    assert before == after
    assert app.config_of(before["applications"][0]["args"]) == config


def test_the_shipped_configuration_composes_to_the_defaults():
    assert compose.load("serve", ServeConfig) == ServeConfig(registry="runs/registry")
    with pytest.raises(ConfigError, match="max_batch_size"):
        compose.load("serve", ServeConfig, ["max_bach_size=2"])


@pytest.mark.parametrize(
    "settings",
    [
        {"port": 0},
        {"max_replicas": 0},
        {"min_replicas": 2},
        {"max_batch_size": 0},
        {"max_batch_size": 32},
        {"threads": 0},
        {"follow_s": -1.0},
        {"request_timeout_s": 0.0},
        {"text_precision": "fp16"},
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings):
    with pytest.raises(ConfigError):
        ServeConfig(**settings)


def test_a_model_folder_is_called_by_name_and_digest(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    digest = manifest.publish(tmp_path / "source", tmp_path / "model", kind="model").digest
    assert find_release(ServeConfig(release=str(tmp_path / "model"))).id == f"model-{digest[:12]}"


def test_a_port_in_use_is_refused_by_number():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentRefused, match=f"Port {port}.*") as caught:
            require_free_port("127.0.0.1", port)
    assert "port=" in caught.value.mend
    require_free_port("127.0.0.1", port)


def test_the_greeting_asks_for_a_key_only_where_one_is_needed():
    release = Release(id="r-7", uri="releases/r-7")
    closed = ServeConfig(host="0.0.0.0", key_hashes=[keys.hash_of("k")])
    for config, needed in ((closed, True), (ServeConfig(host="::1", allow_anonymous=True), False)):
        text = greeting(base_url(config), release, with_key=bool(config.key_hashes))
        assert ("Authorization" in text) == needed and keys.hash_of("k") not in text
    assert base_url(closed) == "http://127.0.0.1:8000" and "http://[::1]:8000/v1" in text


@pytest.mark.parametrize(
    ("config", "route"),
    [
        ({}, "/v1/images/generations"),
        ({"beside": {"kind": "none"}}, "/v1/images/generations"),
        ({"beside": {"kind": "super_resolution"}}, "/v1/images/edits"),
        ({"frames": 16}, "/v1/videos/generations"),
        ({"policy": {}}, "/v1/actions"),
    ],
)
def test_the_greeting_shows_a_route_that_the_model_answers(tmp_path, config, route):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    manifest.publish(tmp_path / "source", tmp_path / "r-7", kind="release")
    text = greeting("http://h", Release(id="r-7", uri=str(tmp_path / "r-7")), with_key=False)
    assert f"http://h{route}" in text and "r-7" in text
    assert ("generations" in text) == ("generations" in route)
