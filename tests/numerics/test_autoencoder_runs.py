"""Whole runs of stage 1 beside the KL autoencoder's first: VQ, a decoder alone, and what neither may change."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentray import build
from latentray.checkpoint import weights
from latentray.config import compose
from latentray.config.export import Export
from latentray.config.train import Train
from latentray.data import latents
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.training import consolidation, initial_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
CODES = 32
VQ = [
    "autoencoder.kind=vq", f"autoencoder.codebook_size={CODES}", "checkpoint_every_samples=16",
    "stage.discriminator.weight=0",  # an adversarial pair would amplify a pixel at the border of two vectors
]  # fmt: skip
CODEBOOK = "quantizer.codebook_KD"


def run_all(folder: Path, jobs: list[dict], *, world: int = 1, expect: int = 0) -> str:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    script = Path(__file__).with_name("runs.py")
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder / "jobs.json"), str(port)],
        cwd=folder, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def stage1(tiny_stage1: list[str], inputs: dict[str, str]) -> list[str]:
    return [*tiny_stage1, f"data={inputs['data']}"]


@pytest.fixture(scope="module")
def tiny_stage1() -> list[str]:
    return sys.modules["tiny"].STAGE1


@pytest.fixture(scope="module")
def folder(stage1: list[str], inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Name -> the folder of its run."""
    root = tmp_path_factory.mktemp("autoencoders")

    def job(name: str, *overrides: str, **more: int) -> dict:
        return {"name": name, "overrides": [*stage1, *overrides, f"run={name}", f"out={root / name}"], **more}

    decoder = ["stage.train_only=decoder", f"autoencoder_from={inputs['autoencoder']}"]
    one = [
        job("vq", *VQ),
        job("decoder", *decoder, "deepspeed=zero1", "precision=bf16"),
        job("sd3_form", "autoencoder.latent_channels=16", "autoencoder.quant_convolutions=false", "total_samples=16"),
        job("further", f"autoencoder_from={inputs['autoencoder']}", "total_samples=8", "optimizer.lr=1e-12"),
        job("killed", *VQ, die_at=4),
    ]
    run_all(root, one, expect=9)
    of_vq = [
        "autoencoder.kind=vq", f"autoencoder.codebook_size={CODES}", "stage.train_only=decoder",
        f"autoencoder_from={root / 'vq' / 'autoencoder'}",
    ]  # fmt: skip
    assert "at step 4" in run_all(root, [job("killed", *VQ), job("decoder_of_vq", *of_vq)])
    two = [job(f"vq_zero{zero}", *VQ, f"deepspeed=zero{zero}") for zero in (0, 3)]
    run_all(root, [*two, job("decoder_zero3", *decoder, "deepspeed=zero3")], world=2)
    return root


def exported(run: Path) -> dict[str, Tensor]:
    return weights.read(run / "autoencoder" / "autoencoder.safetensors")


def trajectory(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_killed_vq_run_ends_at_the_same_bits(folder):
    assert largest_difference(exported(folder / "vq"), exported(folder / "killed")) == 0.0
    raw = [weights.read(folder / name / "raw.safetensors") for name in ("vq", "killed")]
    assert largest_difference(*raw) == 0.0


@pytest.mark.parametrize("zero", [0, 3])
def test_two_workers_learn_the_codebook_of_one(folder, zero):
    assert exported(folder / "vq")[CODEBOOK].shape == (CODES, 4)
    assert largest_difference(exported(folder / "vq"), exported(folder / f"vq_zero{zero}")) < 5e-4
    for name in ("train/loss", "codebook/usage", "codebook/perplexity"):
        one, two = (trajectory(folder / run, name) for run in ("vq", f"vq_zero{zero}"))
        assert two == pytest.approx(one, rel=1e-3), name


def test_a_vq_autoencoders_card_tells_how_the_codebook_is_used(folder):
    found = json.loads((folder / "vq" / "autoencoder" / "manifest.json").read_text())["meta"]["figures"]
    assert 0 < found["codebook_usage"] <= 1
    assert 1 <= found["codebook_perplexity"] <= CODES
    assert trajectory(folder / "vq", "validation/codebook_usage") == [found["codebook_usage"]]
    assert {"psnr", "ssim", "rfid"} <= found.keys()
    assert min(trajectory(folder / "vq", "autoencoder/commitment")) > 0
    assert not trajectory(folder / "vq", "autoencoder/kl")


def test_a_codebook_of_512_is_used_after_a_short_run_on_shapes(tmp_path):
    tiny = sys.modules["tiny"]
    for split, count in (("train", 480), ("validation", 96)):
        tiny.write_pictures(tmp_path, split, count, per_shard=96)
    overrides = [
        "experiment=shapes_vq", f"data={tmp_path / 'data'}", "cluster=none", "cluster.device=cpu", "tracking=none",
        "total_samples=3840", "log_every_samples=960", "run=shapes", f"out={tmp_path / 'shapes'}",
    ]  # fmt: skip
    run_all(tmp_path, [{"name": "shapes", "overrides": overrides}])
    figures = json.loads((tmp_path / "shapes" / "autoencoder" / "manifest.json").read_text())["meta"]["figures"]
    print(f"{figures['codebook_usage']:.1%} of 512 vectors in use, perplexity {figures['codebook_perplexity']:.1f}")
    assert exported(tmp_path / "shapes")[CODEBOOK].shape == (512, 4)
    assert figures["codebook_usage"] > 0.5
    assert figures["codebook_perplexity"] > 100


def test_sd_3s_form_of_sixteen_channels_trains_and_its_scale_and_shift_make_latents_of_spread_one(folder, inputs):
    made = build.autoencoder_artifact(str(folder / "sd3_form" / "autoencoder"))
    assert made.config.latent_channels == 16 and not any("quant" in name for name in made.state())
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = made.load().encode(pictures).mean_BChw
    assert mean.shape[1] == 16
    torch.testing.assert_close(made.scale.restore(made.scale.normalise(mean)), mean)
    assert made.scale.shift != 0


def test_ddpm_in_pixels_trains_and_is_drawn_from(inputs, tmp_path):
    """The identity needs no stage 1: online, exported and sampled as any autoencoder (Ho et al. 2020)."""
    overrides = [
        *sys.modules["tiny"].STAGE2, f"data={inputs['data']}", "online.enabled=true", "size=16", "stage.latent=mean",
        f"online.text_encoder={inputs['text_encoder']}", "online.flip=true", "autoencoder_from=identity",
        "denoiser.in_channels=3", "denoiser.out_channels=3", "stage.sampling_steps=3", "run=pixels",
        "objective=epsilon", "objective.schedule=linear", "stage.sampler=ddpm",
        f"out={tmp_path / 'pixels'}",
    ]  # fmt: skip
    run_all(tmp_path, [{"name": "pixels", "overrides": overrides}])
    assert all(0 < loss < 5 for loss in trajectory(tmp_path / "pixels", "train/loss"))
    made = TextToImage.load(str(tmp_path / "pixels" / "model"), device="cpu")
    assert made.downsampling == 1 and made.autoencoder.config.kind == "identity"
    (drawn,) = made.sample(
        [
            SamplingRequest(
                prompt="a red circle", steps=2, guidance_scale=1.0, seed=0, height=16, width=16, sampler="ddpm"
            )
        ]
    )
    assert drawn.pixels_HWC.shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["decoder", "decoder_zero3", "decoder_of_vq"])
def test_a_decoder_trained_on_leaves_the_encoder_to_the_bit(folder, inputs, name):
    begun = folder / "vq" / "autoencoder" if name == "decoder_of_vq" else inputs["autoencoder"]
    before, after = (
        build.autoencoder_artifact(str(begun)),
        build.autoencoder_artifact(str(folder / name / "autoencoder")),
    )
    old, new = before.state(), after.state()
    assert old.keys() == new.keys()
    for key in old:
        kept = key.startswith(("encoder.", "quantizer."))
        assert torch.equal(old[key], new[key]) == kept, key
    assert after.fingerprint == before.fingerprint and after.scale == before.scale
    assert after.digest != before.digest
    assert json.loads((folder / name / "manifest.json").read_text())


def test_latents_are_taken_with_a_decoder_trained_on_and_with_no_other_encoder(folder, inputs):
    described = latents.describe(f"{inputs['latents']}/train")
    described.require_autoencoder(build.autoencoder_artifact(str(folder / "decoder" / "autoencoder")))
    with pytest.raises(FingerprintMismatch):
        described.require_autoencoder(build.autoencoder_artifact(str(folder / "vq" / "autoencoder")))


def test_an_autoencoder_trained_on_begins_with_the_weights_that_are_named(folder, inputs):
    before = build.autoencoder_artifact(inputs["autoencoder"])
    after = build.autoencoder_artifact(str(folder / "further" / "autoencoder"))
    assert 0 < largest_difference(before.state(), after.state()) < 1e-6  # one step of next to nothing
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["stage.train_only=decoder"], "autoencoder_from"),
        (["autoencoder_from={autoencoder}", "autoencoder.latent_channels=8"], "autoencoder.latent_channels"),
        (["autoencoder_from=identity"], "autoencoder.kind"),
        (["autoencoder.kind=identity", "autoencoder.latent_channels=3"], "autoencoder.kind"),
        (["stage.train_only=encoder"], "stage.train_only"),
    ],
)
def test_what_stage_1_cannot_begin_with_is_refused(stage1, inputs, overrides, where):
    with pytest.raises(ConfigError) as caught:
        initial_weights.autoencoder(
            compose.load("train", Train, [*stage1, *(one.format(**inputs) for one in overrides)])
        )
    assert caught.value.where == where
    assert caught.value.mend


@pytest.mark.parametrize("name", ["killed", "vq_zero3"])
def test_whole_weights_come_out_of_a_checkpoint_with_their_codebook(folder, tmp_path, name):
    consolidation.export(Export(run=str(folder / name), out=str(tmp_path / "weights")))
    found = weights.read(tmp_path / "weights" / "autoencoder.safetensors")
    assert largest_difference(found, exported(folder / name)) == 0.0
