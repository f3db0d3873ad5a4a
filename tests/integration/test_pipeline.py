"""The whole pipeline in miniature on one machine, from drawn pictures to a release, with a worker killed on the way.

Every part is the real one: Ray Data, Ray Train, DeepSpeed, WebDataset shards. What the models draw is noise; what is
tested is what passes from one job to the next. `test_two_nodes.py` runs the same on two nodes and S3.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from latentray import build
from latentray.checkpoint import manifest, weights
from latentray.config import compose
from latentray.config.build_shards import BuildShards
from latentray.config.evaluate import Evaluate
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.promote import Gate, PromoteConfig
from latentray.config.train import Train
from latentray.data import precompute, shard_building, synthetic
from latentray.data.latents import describe
from latentray.data.shards import IndexedShards
from latentray.errors import AlreadyExists, DigestMismatch, FingerprintMismatch, GateRefused, InputMissing
from latentray.evaluation import suite
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.models.autoencoder import LatentScale
from latentray.registry import promotion, versions
from latentray.training import launch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BATCH, STAGE1_STEPS, STAGE2_STEPS, CHECKPOINT_STEPS = 12, 5, 60, 10
TRAIN = [
    "cluster.workers=2",
    "cluster.device=cpu",
    "cluster.threads=1",
    "tracking=none",
    "optimizer.warmup_samples=0",
    f"global_batch_size={BATCH}",
    f"log_every_samples={BATCH}",
    "ema_half_life_samples=24",
]
STAGE1 = [
    *TRAIN,
    "stage=autoencoder",
    "run=ae",
    "autoencoder=shapes_f8",
    "autoencoder.channels=[32]",
    "size=64",
    f"total_samples={STAGE1_STEPS * BATCH}",
    "checkpoint_every_samples=0",
    "precision=fp32",
    "stage.lpips.net=alex",
    "stage.lpips.random_backbone=true",
    f"stage.lpips.start_samples={3 * BATCH}",
    f"stage.discriminator.start_samples={4 * BATCH}",
    "stage.discriminator.channels=8",
    "stage.discriminator.layers=2",
]
STAGE2 = [
    *TRAIN,
    "stage=diffusion",
    "run=diffusion",
    "stage.sampling_steps=4",
    "denoiser=unet_shapes",
    "denoiser.channels=[32,32]",
    "denoiser.head_dim=32",
    "objective=v",
    "deepspeed=zero2",
    f"total_samples={STAGE2_STEPS * BATCH}",
    f"checkpoint_every_samples={CHECKPOINT_STEPS * BATCH}",
    f"keep_checkpoints={STAGE2_STEPS}",
]


class Pipeline:
    """The jobs on one folder, each run by the call that its `jobs/` module makes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data, self.latents, self.registry = root / "data", root / "latents", str(root / "registry")
        self.killed: list[int] = []

    def build(self) -> list[str]:
        shapes = ["source=shapes", "source.n=102", "source.n_validation=54", "samples_per_shard=27"]
        return shard_building.build(compose.load("build_shards", BuildShards, [*shapes, f"out={self.data}"]))

    def train_autoencoder(self) -> str:
        settings = [*STAGE1, f"data={self.data}", f"out={self.root / 'ae'}"]
        return launch.train(compose.load("train", Train, settings))

    def precompute(self) -> list[str]:
        settings = [
            "text_encoder=tiny",
            f"text_encoder.source={self.root / 'text'}",
            f"data={self.data}",
            f"autoencoder_from={self.root / 'ae' / 'autoencoder'}",
            f"out={self.latents}",
            "batch_size=9",
            "actors=[1,1]",
            "device=cpu",
        ]
        return precompute.precompute(compose.load("precompute_latents", PrecomputeLatents, settings))

    def stage2(self, *more: str) -> Train:
        out = self.root / "diffusion"
        return compose.load("train", Train, [*STAGE2, f"latents={self.latents}", f"out={out}", *more])

    def evaluate(self, seed: int) -> str:
        small = ["per_kind=1", "per_unseen_kind=1", "samples=54", "heldout_samples=54", "steps=2", "device=cpu"]
        at = [f"model={self.root / 'diffusion' / 'model'}", f"data={self.data}", f"out={self.root / f'report-{seed}'}"]
        return suite.evaluate(compose.load("evaluate", Evaluate, [*small, *at, f"seed={seed}"]))

    def promotion(self, seed: int, *gates: Gate) -> PromoteConfig:
        return PromoteConfig(
            model=str(self.root / "diffusion" / "model"),
            report=str(self.root / f"report-{seed}"),
            registry=self.registry,
            gates=list(gates),
        )

    def artifact(self, *parts: str) -> manifest.Manifest:
        return manifest.read("/".join([str(self.root), *parts]))


@contextlib.contextmanager
def killing_a_worker(checkpoints: Path) -> Iterator[list[int]]:
    """SIGKILL one Ray Train worker of this test session as soon as a checkpoint is committed; yields its pid, later."""
    killed: list[int] = []
    done = threading.Event()

    def watch() -> None:
        workers: list[psutil.Process] = []
        while not done.wait(0.01):
            workers = workers or training_workers()
            if workers and any(checkpoints.glob("*/manifest.json")):
                workers[0].kill()
                killed.append(workers[0].pid)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        done.set()
        watcher.join()


def training_workers() -> list[psutil.Process]:
    """This session's training workers: Ray titles them, and only its own have its cache folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if not " ".join(process.info["cmdline"] or ()).startswith("ray::RayTrainWorker"):
                continue
            if process.environ().get("LATENTRAY_CACHE") == os.environ["LATENTRAY_CACHE"]:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def pipeline(ray_local, tmp_path_factory) -> Pipeline:
    """Everything up to the trained model, once for all tests of this file."""
    made = Pipeline(tmp_path_factory.mktemp("pipeline"))
    made.build()
    made.train_autoencoder()
    made.precompute()
    with killing_a_worker(made.root / "diffusion" / "checkpoints") as killed:
        launch.train(made.stage2())
    made.killed = killed
    return made


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_shards_hold_what_was_asked_for(pipeline):
    train, validation = (IndexedShards.open(pipeline.data / split) for split in ("train", "validation"))
    assert (train.count, validation.count) == (102, 54) and len(train.shards) == 4
    captions = {train.read(x)["txt"].decode() for x in range(train.count)}
    assert len(captions) == 51
    unseen = {synthetic.caption(kind) for kind in synthetic.UNSEEN}
    assert not captions & unseen and set(train.manifest.meta["unseen"]) == unseen


def test_stage1_logs_each_term_from_its_own_start_and_leaves_a_card(pipeline):
    steps = {line["samples"]: line for line in metrics(pipeline.root / "ae") if "train/loss" in line}
    assert list(steps) == [BATCH * k for k in range(1, STAGE1_STEPS + 1)]
    assert [s for s, line in steps.items() if "autoencoder/lpips" in line] == [4 * BATCH, 5 * BATCH]
    assert [s for s, line in steps.items() if "discriminator/loss" in line] == [5 * BATCH]
    artifact = pipeline.artifact("ae", "autoencoder")
    assert artifact.meta["lpips_backbone"]["source"] == "random"
    assert artifact.meta["figures"].keys() == {"psnr", "ssim", "rfid", "lpips"}
    assert "reconstructions.png" in artifact.files


def test_latents_mirror_the_shards_and_the_scale_is_that_of_the_autoencoder(pipeline):
    shards, latents = (
        IndexedShards.open(p / "train", kind=k) for p, k in ((pipeline.data, "dataset"), (pipeline.latents, "latents"))
    )
    assert [s.name for s in latents.shards] == [s.name for s in shards.shards]
    assert [latents.key(x) for x in range(102)] == [f"{shards.key(x)}_0" for x in range(102)]
    meta = pipeline.artifact("ae", "autoencoder").meta["scale"]
    assert describe(latents.uri).scale == LatentScale(**meta)


def test_a_killed_worker_costs_no_step_and_repeats_none(pipeline):
    assert len(pipeline.killed) == 1, "the worker was to be killed at the first checkpoint"
    attempts: dict[str, list[int]] = {}
    for folder in sorted((pipeline.root / "diffusion" / "checkpoints").iterdir()):
        step, attempt = folder.name.split("-")
        if (folder / manifest.NAME).exists():
            attempts.setdefault(attempt, []).append(int(step))
    first, second = attempts.values()
    every = list(range(CHECKPOINT_STEPS, STAGE2_STEPS + 1, CHECKPOINT_STEPS))
    assert first and second and first + second == every, "it began again at its last checkpoint"
    lines = [line for line in metrics(pipeline.root / "diffusion") if "train/loss" in line]
    assert [line["samples"] for line in lines] == [BATCH * k for k in range(1, STAGE2_STEPS + 1)]
    losses = [line["train/loss"] for line in lines]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_lineage_leads_from_the_model_back_to_the_shards(pipeline):
    data, latents = pipeline.artifact("data", "train"), pipeline.artifact("latents", "train")
    autoencoder, model = pipeline.artifact("ae", "autoencoder"), pipeline.artifact("diffusion", "model")
    text = pipeline.artifact("text")
    assert autoencoder.inputs == {"dataset": data.digest}
    assert latents.inputs == {
        "dataset": data.digest,
        "autoencoder": autoencoder.digest,
        "text_encoder": text.digest,
    }
    assert model.inputs == {
        "latents": latents.digest,
        "autoencoder": autoencoder.digest,
        "text_encoder": text.digest,
    }
    for name, inputs in (
        ("ae", {"dataset": data.digest}),
        ("diffusion", {"latents": latents.digest, "autoencoder": autoencoder.digest}),
    ):
        run = pipeline.artifact(name)
        assert run.kind == "run" and run.inputs == inputs and run.config["total_samples"] > 0
    assert pipeline.artifact("diffusion").meta["result"]["digest"] == model.digest


def test_finished_jobs_do_nothing_again(pipeline):
    before = {p: p.stat().st_mtime_ns for p in pipeline.root.rglob("manifest.json")}
    with pytest.raises(AlreadyExists):
        pipeline.build()
    pipeline.train_autoencoder()
    pipeline.precompute()
    launch.train(pipeline.stage2())
    assert {p: p.stat().st_mtime_ns for p in pipeline.root.rglob("manifest.json")} == before


def test_latents_of_another_autoencoder_are_refused_before_a_worker_starts(pipeline, tmp_path):
    artifact = build.autoencoder_artifact(str(pipeline.root / "ae" / "autoencoder"))
    state = {name: tensor + 1e-3 for name, tensor in weights.read(artifact.weights).items()}
    (tmp_path / "made").mkdir()
    build.write_autoencoder(tmp_path / "made", artifact.config, state, scale=artifact.scale, size=artifact.size)
    manifest.publish(tmp_path / "made", tmp_path / "other", kind="autoencoder")
    with pytest.raises(FingerprintMismatch, match="another autoencoder"):
        launch.train(pipeline.stage2(f"autoencoder_from={tmp_path / 'other'}", f"out={tmp_path / 'run'}", "run=other"))
    assert not (tmp_path / "run").exists()


def test_a_damaged_shard_is_refused_by_name_before_a_worker_starts(pipeline, tmp_path):
    shutil.copytree(pipeline.latents, tmp_path / "latents")
    shard = tmp_path / "latents" / "train" / "00002.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[1000] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DigestMismatch, match="00002.tar"):
        launch.train(pipeline.stage2(f"latents={tmp_path / 'latents'}", f"out={tmp_path / 'run'}", "run=damaged"))
    assert not (tmp_path / "run").exists()


def test_evaluation_promotion_and_rollback(pipeline, capsys):
    report = pipeline.evaluate(seed=0)
    found = json.loads((Path(report) / "report.json").read_text())
    assert found["model"] == pipeline.artifact("diffusion", "model").digest
    with pytest.raises(GateRefused, match="color_accuracy: wanted >= 1, got 0"):
        promotion.promote(pipeline.promotion(0, Gate(metric="fid"), Gate(metric="samples.color_accuracy", min=1.0)))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decision"] == "refused"
    assert versions.read_alias(pipeline.registry, "production") is None

    first = promotion.promote(pipeline.promotion(0, Gate(metric="heldout_loss")))
    release = versions.verify(pipeline.registry, "production")
    model = pipeline.artifact("diffusion", "model")
    assert release.inputs == {**model.inputs, "model": model.digest, "report": release.inputs["report"]}
    assert release.files.keys() == {*model.files, "report.json", "README.md"}
    assert all(release.files[name] == entry for name, entry in model.files.items())
    with pytest.raises(InputMissing, match="never moved"):
        versions.rollback(pipeline.registry, "production")

    pipeline.evaluate(seed=1)
    second = promotion.promote(pipeline.promotion(1, Gate(metric="heldout_loss")))
    assert second != first and versions.read_alias(pipeline.registry, "production").release == second
    weights_file = Path(versions.release_uri(pipeline.registry, first)) / "denoiser.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DigestMismatch, match="denoiser.safetensors"):
        versions.rollback(pipeline.registry, "production")
    assert versions.read_alias(pipeline.registry, "production").release == second
    weights_file.write_bytes(whole)
    assert versions.rollback(pipeline.registry, "production") == first

    drawn = [
        draw(uri)
        for uri in (versions.release_uri(pipeline.registry, first), str(pipeline.root / "diffusion" / "model"))
    ]
    assert torch.equal(*drawn) and drawn[0].shape == (64, 64, 3)


def draw(uri: str) -> torch.Tensor:
    """One picture of a model or release."""
    request = SamplingRequest(
        prompt="a red circle on a white background",
        steps=2,
        guidance_scale=3.0,
        seed=5,
        sampler="ddim",
        height=64,
        width=64,
    )
    return torch.from_numpy(TextToImage.load(uri, device="cpu").sample([request])[0].pixels_HWC)
