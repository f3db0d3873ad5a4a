"""The driver of `test_two_nodes.py`: a third machine, which runs every job of the pipeline on the two-node cluster.

    python driver.py <address of the cluster> <s3://bucket> <checkout>

Its last line is JSON: what the controls saw, the URI of each artifact, the release, and the endpoint's replies.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from latentray.checkpoint import store
from latentray.config import compose
from latentray.config.build_shards import BuildShards
from latentray.config.evaluate import Evaluate
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.promote import PromoteConfig
from latentray.config.serve import ServeConfig
from latentray.config.train import Train

TRAIN = ["cluster.workers=2", "cluster.device=cpu", "cluster.threads=1", "tracking=none", "optimizer.warmup_samples=0"]
AUTOENCODER = [
    *TRAIN,
    "stage=autoencoder",
    "autoencoder=shapes_f8",
    "autoencoder.channels=[32]",
    "size=64",
    "total_samples=60",
    "global_batch_size=12",
    "precision=fp32",
    "stage.lpips.net=alex",
    "stage.lpips.random_backbone=true",
    "stage.lpips.weight=0.1",
    "stage.lpips.start_samples=36",
    "stage.discriminator.start_samples=48",
    "stage.discriminator.channels=8",
    "stage.discriminator.layers=2",
    "log_every_samples=12",
    "checkpoint_every_samples=36",
    "ema_half_life_samples=24",
]
DIFFUSION = [
    *TRAIN,
    "stage=diffusion",
    "stage.sampling_steps=4",
    "denoiser=unet_shapes",
    "denoiser.channels=[32,32]",
    "denoiser.head_dim=32",
    "objective=v",
    "deepspeed=zero2",
    "total_samples=720",
    "global_batch_size=12",
    "log_every_samples=12",
    "checkpoint_every_samples=120",
    "keep_checkpoints=60",
    "ema_half_life_samples=24",
]
SMALL = ["per_kind=1", "per_unseen_kind=1", "samples=54", "heldout_samples=54", "steps=4", "device=cpu"]


@ray.remote(num_cpus=0)
def write_here() -> str:
    path = Path.home() / "a-file-of-this-node"
    path.write_text("made here")
    assert path.read_text() == "made here"
    return str(path)


@ray.remote(num_cpus=0, max_retries=0)
def attempt(path: str, mode: str) -> str:
    """What comes of opening a path on a node."""
    try:
        with open(path, mode):
            return "opened"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def controls(elsewhere: str) -> dict[str, Any]:
    """Prove on each node that its own file opens, and that another machine's file, and a shared place, do not."""
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    on = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    files = ray.get([write_here.options(scheduling_strategy=s).remote() for s in on])
    mine = Path.home() / "a-file-of-the-driver"
    mine.write_text("made here")
    return {
        "own": ray.get([attempt.options(scheduling_strategy=s).remote(f, "r") for s, f in zip(on, files, strict=True)]),
        "other": ray.get(
            [attempt.options(scheduling_strategy=s).remote(f, "r") for s, f in zip(on, files[::-1], strict=True)]
        ),
        "drivers": ray.get([attempt.options(scheduling_strategy=s).remote(str(mine), "r") for s in on]),
        "shared": ray.get([attempt.options(scheduling_strategy=s).remote(elsewhere, "a") for s in on]),
        "driver": [attempt._function(f, "r") for f in files],
    }


def pipeline(address: str, root: str) -> dict[str, Any]:
    """Every job, from drawn pictures to an endpoint; all that passes from one to the next is at s3:// URIs."""
    from latentray.data import precompute, shard_building
    from latentray.evaluation import suite
    from latentray.registry import promotion
    from latentray.training import launch

    at = {name: f"{root}/{name}" for name in ("data", "latents", "ae", "diffusion", "registry", "report", "text")}
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def done(job: str) -> None:
        seconds[job] = round(time.monotonic() - began - sum(seconds.values()), 1)
        print(f"{job}: {seconds[job]} s", flush=True)

    shapes = ["source=shapes", "source.n=102", "source.n_validation=54", "samples_per_shard=27"]
    shard_building.build(
        compose.load("build_shards", BuildShards, [*shapes, f"out={at['data']}", f"address={address}"])
    )
    done("build_shards")
    on_cluster = f"cluster.address={address}"
    stage1 = [*AUTOENCODER, on_cluster, f"data={at['data']}", "run=ae", f"out={at['ae']}"]
    autoencoder = launch.train(compose.load("train", Train, stage1))
    done("train stage=autoencoder")
    encode = [
        "text_encoder=tiny",
        f"text_encoder.source={at['text']}",
        f"data={at['data']}",
        f"autoencoder_from={autoencoder}",
        f"out={at['latents']}",
        "batch_size=9",
        "actors=[2,2]",
        "device=cpu",
        f"address={address}",
    ]
    precompute.precompute(compose.load("precompute_latents", PrecomputeLatents, encode))
    done("precompute_latents")
    stage2 = [*DIFFUSION, on_cluster, f"latents={at['latents']}", "run=diffusion", f"out={at['diffusion']}"]
    with killing_the_workers(at["diffusion"]) as killed:
        model = launch.train(compose.load("train", Train, stage2))
    done("train stage=diffusion")
    measured = [*SMALL, f"model={model}", f"data={at['data']}", f"out={at['report']}"]
    report = suite.evaluate(compose.load("evaluate", Evaluate, measured))
    done("evaluate")
    gated = [f"model={model}", f"report={report}", f"registry={at['registry']}"]
    release = promotion.promote(compose.load("promote", PromoteConfig, gated))
    done("promote")
    reply, models = draw(address, at["registry"])
    done("serve")
    found = {"autoencoder": autoencoder, "model": model, "release": release, "models": models, "reply": reply}
    found["killed"] = killed
    return {"at": at, "seconds": seconds, **found}


@contextlib.contextmanager
def killing_the_workers(run: str) -> Iterator[list[dict[str, Any]]]:
    """SIGKILL the training workers of both nodes once a checkpoint is committed; yields what was killed, later."""
    killed: list[dict[str, Any]] = []
    done = threading.Event()

    def watch() -> None:
        workers: list[psutil.Process] = []
        while not done.wait(0.02):
            workers = workers if len(workers) == 2 else training_workers()
            committed = [n for n in store.list_files(f"{run}/checkpoints") if n.endswith("/manifest.json")]
            if committed and len(workers) == 2:
                has_metrics = store.exists(f"{run}/metrics.jsonl")
                for worker in workers:
                    worker.kill()
                killed.extend({"pid": w.pid, "checkpoint": committed[-1], "metrics": has_metrics} for w in workers)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        done.set()
        watcher.join()


def training_workers() -> list[psutil.Process]:
    """The training workers of this test's nodes: Ray titles them, and the guard's settings name the test's folder."""
    base = json.loads(os.environ["LATENTRAY_TEST_GUARD"])["base"]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if not " ".join(process.info["cmdline"] or ()).startswith("ray::RayTrainWorker"):
                continue
            if base in process.environ().get("LATENTRAY_TEST_GUARD", ""):
                found.append(process)
    return found


def draw(address: str, registry: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Serve what the alias names and ask for a picture over HTTP: the reply, and the list of models."""
    from serving import launch

    port = free_port()
    settings = [f"registry={registry}", f"port={port}", f"address={address}", "allow_anonymous=true", "device=cpu"]
    endpoint = launch.serve(compose.load("serve", ServeConfig, settings), block=False)
    try:
        asked = {
            "prompt": "a red circle on a white background",
            "seed": 7,
            "num_inference_steps": 3,
            "model": "production",
        }
        request = urllib.request.Request(
            f"{endpoint.base_url}/v1/images/generations",
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        open_ = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        with open_(request, timeout=60) as reply, open_(f"{endpoint.base_url}/v1/models", timeout=30) as models:
            return json.load(reply), json.load(models)
    finally:
        endpoint.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    address, root, checkout, elsewhere = sys.argv[1:]
    guard = str(Path(__file__).parent)
    # As jobs.submit ships the checkout, to run from each node's own copy; the guard is the nodes' own.
    env = {"working_dir": checkout, "env_vars": {"PYTHONPATH": os.pathsep.join(["platform", guard])}}
    ray.init(address=address, runtime_env=env, logging_level="error")
    try:
        found = {"controls": controls(elsewhere)} | pipeline(address, root)
    finally:
        ray.shutdown()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
