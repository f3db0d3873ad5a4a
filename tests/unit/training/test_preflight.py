"""What is refused before any worker starts, and leaves nothing behind."""

import shutil
import types
from pathlib import Path

import pytest

from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.train import Train
from latentray.errors import (
    ArtifactError,
    ConfigError,
    DigestMismatch,
    EnvironmentRefused,
    FingerprintMismatch,
    InputMissing,
)
from latentray.training import checkpoint, feed, here, launch, on_ray
from latentray.training import inputs as checks


@pytest.fixture
def refused(tiny, inputs, tmp_path, monkeypatch):
    """refused(error, stage, *overrides): the error that training raises instead of starting."""

    def start(*_args, **_kwargs):
        raise AssertionError("a worker was started")

    monkeypatch.setattr(here, "train", start)
    monkeypatch.setattr(on_ray, "train", start)

    def check(error, stage: int, *overrides: str):
        given = (
            [*tiny.STAGE1, f"data={inputs['data']}"] if stage == 1 else [*tiny.STAGE2, f"latents={inputs['latents']}"]
        )
        out = tmp_path / "run"
        with pytest.raises(error) as caught:
            launch.train(compose.load("train", Train, [*given, f"out={out}", *overrides]))
        assert type(caught.value) is error
        assert not out.exists()
        return caught.value

    return check


def copy_of(folder: str, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def flip(path: Path, at: int = 700) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("stage", [1, 2])
def test_good_inputs_reach_the_worker(refused, stage):
    with pytest.raises(AssertionError, match="a worker was started"):
        refused(ConfigError, stage)


def test_latents_of_another_autoencoder(refused, tiny, tmp_path):
    other = tiny.write_autoencoder(str(tmp_path / "other"), seed=1)
    error = refused(FingerprintMismatch, 2, f"autoencoder_from={other}")
    assert other in error.where
    rescaled = tiny.write_autoencoder(str(tmp_path / "rescaled"), scale=3.0)  # the same weights, another scale
    refused(FingerprintMismatch, 2, f"autoencoder_from={rescaled}")


@pytest.mark.parametrize(("stage", "key"), [(1, "data"), (2, "latents")])
def test_a_shard_that_differs_from_the_index(refused, inputs, tmp_path, stage, key):
    copy = copy_of(inputs[key], tmp_path / "copy")
    flip(copy / "train" / "00001.tar")
    error = refused(DigestMismatch, stage, f"{key}={copy}")
    assert error.where.endswith("00001.tar")


@pytest.mark.parametrize(("stage", "key"), [(1, "data"), (2, "latents")])
def test_data_that_is_not_there(refused, stage, key):
    assert refused(InputMissing, stage, f"{key}=/nowhere").where == "/nowhere/train"
    assert refused(ConfigError, stage, f"{key}=null").where == key


def test_data_of_the_wrong_kind(refused, inputs):
    refused(ArtifactError, 1, f"data={inputs['latents']}")
    refused(ArtifactError, 2, f"latents={inputs['data']}")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_global_batch_that_the_workers_do_not_divide(refused, monkeypatch, stage):
    monkeypatch.setenv("WORLD_SIZE", "3")  # as torchrun sets it
    error = refused(ConfigError, stage)
    assert error.where == "global_batch_size"
    assert "1, 2, 4, 8" in error.mend


def test_online_tracking_without_a_key(refused, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    error = refused(EnvironmentRefused, 2, "tracking=wandb", "tracking.mode=online")
    assert error.where == "tracking.mode"


def test_a_disk_that_is_nearly_full(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: types.SimpleNamespace(free=1 << 20))
    assert "1 MiB free" in refused(EnvironmentRefused, 1).what


def test_parameters_on_a_disk_that_this_machine_cannot_use(refused, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    nvme = ["deepspeed=zero3", "deepspeed.offload_parameters=nvme", "deepspeed.nvme_path=/proc/nowhere"]
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    assert "libaio" in refused(EnvironmentRefused, 2, *nvme).mend
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    assert refused(EnvironmentRefused, 2, *nvme).where == "deepspeed.nvme_path"
    refused(ConfigError, 2, "deepspeed=zero2", "deepspeed.offload_optimizer=nvme")
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    optimizer = ["deepspeed=zero2", "deepspeed.offload_optimizer=nvme", "deepspeed.nvme_path=/proc/nowhere"]
    assert refused(EnvironmentRefused, 2, *optimizer).where == "deepspeed.nvme_path"


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("zero_optimization:{overlap_comm:perhaps}", "zero_optimization.overlap_comm"),
        ("zero_optimization:{reduce_bucket_size:-1}", "zero_optimization.reduce_bucket_size"),
        ("gradient_allreduce_op:guess", ""),
    ],
)
def test_a_value_that_deepspeed_refuses(refused, extra, where):
    error = refused(ConfigError, 2, f"deepspeed.extra={{{extra}}}")
    assert error.where == f"deepspeed.extra.{where}".rstrip(".")
    assert error.what.startswith("DeepSpeed refuses its configuration: ") and "pydantic" not in error.what


def test_a_value_that_deepspeed_takes_reaches_the_worker(refused):
    with pytest.raises(AssertionError, match="a worker was started"):
        refused(ConfigError, 2, "deepspeed.extra={zero_optimization:{overlap_comm:false},aio:{block_size:65536}}")


@pytest.mark.parametrize("online", [False, True])
def test_a_run_that_would_read_its_data_in_another_order(tiny, inputs, tmp_path, monkeypatch, online):
    monkeypatch.setattr(here, "train", lambda *_: pytest.fail("a worker was started"))
    given = tiny.online(inputs) if online else [*tiny.STAGE2, f"latents={inputs['latents']}"]

    def load(*overrides: str) -> Train:
        return compose.load("train", Train, [*given, f"out={tmp_path / 'run'}", *overrides])

    config = load()
    encoded_by = ["of the encoders"] if online else []
    cursor = feed.Feed.open(config, encoded_by=encoded_by).order.cursor(2)
    meta = {"format": checkpoint.FORMAT, "cursor": cursor.to_dict(), "samples": 2, "world": 1, "clock": {}}
    manifest.seal(
        str(tmp_path / "run" / "checkpoints" / "000000002-aaa"), {}, kind="checkpoint", inputs=checks.check(config, 1),
        config=compose.to_dict(config), meta=meta,
    )  # fmt: skip
    other = [("seed=1", "seed"), ("global_batch_size=12", "global_batch_size")]
    for override, where in [*other] if online else [*other, ("order.depth=3", "data")]:
        with pytest.raises(FingerprintMismatch) as caught:
            launch.train(load(override))
        assert caught.value.where == where
    for goes_on in ([], ["seed=1", "resume.allow=[data]"]):
        with pytest.raises(pytest.fail.Exception, match="a worker was started"):
            launch.train(load(*goes_on))


@pytest.mark.parametrize("key", ["in_channels", "out_channels", "context_width"])
def test_a_denoiser_that_does_not_fit_the_latents(refused, key):
    error = refused(ConfigError, 2, f"denoiser.{key}=7")
    assert error.where == f"denoiser.{key}"
    assert "=16" in error.mend or "=4" in error.mend


def test_a_finished_run_is_not_trained_again(tiny, inputs, tmp_path, monkeypatch):
    config = compose.load("train", Train, [*tiny.STAGE2, f"latents={inputs['latents']}", f"out={tmp_path}"])
    monkeypatch.setattr(launch, "preflight", lambda *_: pytest.fail("it was begun again"))
    tiny.manifest.publish(Path(inputs["text_encoder"]), tmp_path / "model", kind="model")
    assert launch.train(config) == str(tmp_path / "model")


def test_new_runs_have_names_of_their_own():
    names = {launch.new_run_id("diffusion") for _ in range(20)}
    assert len(names) > 15
    assert all(name.startswith("diffusion-") for name in names)
