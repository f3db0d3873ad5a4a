"""Whole runs of stage 2 on what its latents may come from: buckets, mixtures of them, and pictures encoded online."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from latentray.checkpoint import manifest, weights

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_for_supply", HERE / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _start(root: Path, jobs: dict[str, list[str]], *, world: int = 1, die_at: int | None = None) -> str:
    listed = [
        {"overrides": [*overrides, f"run={name}", f"out={root / name}"], "die_at": die_at}
        for name, overrides in jobs.items()
    ]
    (root / "jobs.json").write_text(json.dumps(listed))
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "runs.py"), str(root / "jobs.json"), str(port)],
        env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == (0 if die_at is None else 9), done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """The folder of all runs."""
    root, tiny = tmp_path_factory.mktemp("supply"), _load("tiny")
    shapes = _load("several_shapes").build_all(root / "shapes", tiny, inputs)
    online = [
        "online.enabled=true", f"autoencoder_from={inputs['autoencoder']}", "online.batch_size=16",
        f"online.text_encoder={inputs['text_encoder']}", "online.text_dtype=float32",
    ]  # fmt: skip
    longer = [*tiny.STAGE2, "buckets.multiple=2", "total_samples=144"]
    buckets = [*longer, f"latents={shapes['buckets']}"]
    pictures = [*tiny.STAGE2, f"data={inputs['data']}", *online]
    mixed = [*longer, f"mixture.of=[{{uri:{inputs['latents']},weight:1}},{{uri:{shapes['buckets']},weight:3}}]"]
    often = [*buckets, "checkpoint_every_samples=40"]
    jobs = {
        "mean": [*tiny.STAGE2, f"latents={inputs['latents']}", "stage.latent=mean"],
        "mean_online": [*pictures, "stage.latent=mean"],
        "draw": [*tiny.STAGE2, f"latents={inputs['latents']}"],
        "draw_online": pictures,
        "buckets": buckets,
        "buckets_online": [*longer, f"data={shapes['data']}", *online, "buckets.sizes=[32,64]", "buckets.step=16"],
        "mixed": mixed,
    }
    _start(root, jobs)
    _start(root, {"resumed": often}, die_at=5)
    assert "at step 5" in _start(root, {"resumed": often})
    micro = ["micro_batch_size=2", "buckets.multiple=4"]
    _start(
        root,
        {
            "draw_online_two": [*pictures, "micro_batch_size=2"],
            "buckets_two": buckets,
            "mixed_two": mixed,
            "micro_two": [*buckets, *micro],
        },
        world=2,
    )
    return root


def lines(run: Path) -> list[dict]:
    return [one for one in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "train/loss" in one]


def losses(run: Path) -> list[float]:
    return [one["train/loss"] for one in lines(run)]


def largest_difference(a: Path, b: Path, name: str) -> float:
    one, two = weights.read(a / name), weights.read(b / name)
    assert one.keys() == two.keys()
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.mark.parametrize("stored", ["mean", "draw", "buckets"])
def test_online_and_stored_latents_train_to_the_same_bits(finished, stored):
    one, two = finished / stored, finished / f"{stored}_online"
    assert losses(one) == losses(two)
    assert len(set(losses(one))) == len(losses(one)) >= 6  # it moves
    for name in ("raw.safetensors", "model/denoiser.safetensors", "model/autoencoder.safetensors"):
        assert largest_difference(one, two, name) == 0.0


def test_what_is_drawn_trains_otherwise_than_the_mean(finished):
    assert largest_difference(finished / "mean", finished / "draw", "raw.safetensors") > 1e-4


def test_steps_count_the_samples_of_their_own_bucket(finished):
    seen = [one["samples"] for one in lines(finished / "buckets")]
    sizes = [after - before for before, after in zip([0, *seen], seen, strict=False)]
    assert set(sizes) == {8, 32} and seen[-1] == 144
    assert manifest.read(str(finished / "buckets" / "model")).meta["samples"] == 144


@pytest.mark.parametrize("alone", ["draw_online", "buckets", "mixed"])
def test_two_workers_follow_one(finished, alone):
    one, two = finished / alone, finished / f"{alone}_two"
    assert [line["samples"] for line in lines(one)] == [line["samples"] for line in lines(two)]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert largest_difference(one, two, "model/denoiser.safetensors") < 5e-4


def test_micro_batches_of_two_workers_change_only_sums(finished):
    """Batches are multiples of 4 then: those of 32 pixels square stay 32, the others 8."""
    one, two = finished / "buckets", finished / "micro_two"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert largest_difference(one, two, "raw.safetensors") < 5e-4


def test_a_killed_run_in_buckets_ends_at_the_same_bits(finished):
    for name in ("raw.safetensors", "model/denoiser.safetensors"):
        assert largest_difference(finished / "buckets", finished / "resumed", name) == 0.0
    assert losses(finished / "resumed") == losses(finished / "buckets")


def test_an_online_model_tells_its_lineage_and_draws(finished):
    listing = manifest.read(str(finished / "draw_online" / "model"))
    assert {"dataset", "autoencoder", "text_encoder"} == listing.inputs.keys()
    stored = manifest.read(str(finished / "draw" / "model"))
    for fact in ("autoencoder", "text_encoder"):
        assert listing.meta[fact] == stored.meta[fact]
        assert listing.inputs[fact] == stored.inputs[fact]
    assert any((finished / "draw_online").rglob("*samples*.png"))
