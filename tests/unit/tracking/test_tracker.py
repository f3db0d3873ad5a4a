"""The check before a job starts, and how mode `auto` decides."""

import dataclasses
import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from latentray import tracking
from latentray.config import compose
from latentray.config.tracking import TrackingConfig
from latentray.errors import ConfigError, EnvironmentRefused
from latentray.tracking import names
from latentray.tracking.wandb_tracker import api_key, artifact_name, effective_mode


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_online_without_a_key_is_refused_with_its_mend():
    with pytest.raises(EnvironmentRefused) as caught:
        tracking.check(TrackingConfig(mode="online"))
    assert caught.value.where == "tracking.mode"
    assert "WANDB_API_KEY" in caught.value.mend
    assert "offline" in caught.value.mend


@pytest.mark.parametrize("mode", ["auto", "offline", "disabled"])
def test_other_modes_need_no_key(mode):
    tracking.check(TrackingConfig(mode=mode))


def test_auto_is_online_only_where_a_key_is_found(monkeypatch, tmp_path):
    assert effective_mode(TrackingConfig()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert effective_mode(TrackingConfig()) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert effective_mode(TrackingConfig()) == "disabled"
    assert effective_mode(TrackingConfig(mode="offline")) == "offline"


def test_the_key_in_netrc_counts_for_its_own_host_only(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text(
        f"machine wandb.example.org\n login user\n password {'p' * 40}\n"
    )  # pragma: allowlist secret
    assert api_key() is None
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/")
    assert api_key() == "p" * 40
    tracking.check(TrackingConfig(mode="online"))


def test_a_broken_netrc_is_no_key(tmp_path):
    (tmp_path / "netrc").write_text("this is { not a netrc")
    assert api_key() is None


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"mode": "onlin"}, "tracking.mode"),
        ({"project": " "}, "tracking.project"),
        ({"start_seconds": 0}, "tracking.start_seconds"),
        ({"finish_seconds": -1}, "tracking.finish_seconds"),
    ],
)
def test_bad_settings_name_their_key(settings, where):
    with pytest.raises(ConfigError) as caught:
        TrackingConfig(**settings)
    assert caught.value.where == where


def test_disabled_still_writes_metrics_and_imports_no_wandb(tmp_path):
    tracker = tracking.open(TrackingConfig(mode="disabled"), "r1", tmp_path, {"a": 1})
    tracker.log(96, {names.TRAIN_LOSS: np.float32(0.5)})
    tracker.finish()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 0.5
    assert tracker.sync_command is None
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(("group", "mode"), [("wandb", "auto"), ("none", "disabled")])
def test_the_groups_files_are_whole_and_valid(group, mode):
    config = OmegaConf.load(compose.conf_dir() / "tracking" / f"{group}.yaml")
    assert set(config) == {field.name for field in dataclasses.fields(TrackingConfig)}
    assert compose.typed(config, TrackingConfig).mode == mode


def test_names_are_unique_and_have_a_part():
    literal = {key: value for key, value in vars(names).items() if key.isupper()}
    assert len(set(literal.values())) == len(literal)
    assert all(value.count("/") == 1 for value in literal.values())
    assert names.validation_loss_at(500) == "validation/loss_at/0500"


def test_producer_and_consumer_derive_one_artifact_name():
    assert (
        artifact_name("latents", "sha256:" + "ab" * 32) == artifact_name("latents", "ab" * 32) == "latents-" + "ab" * 8
    )
