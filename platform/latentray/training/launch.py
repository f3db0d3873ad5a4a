"""From a training configuration to running workers: Ray Train, or this very process (alone or under torchrun).

Everything that can be refused is refused here, before a cluster starts.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import secrets
import sys
from typing import Any

import torch

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.train import Train
from latentray.errors import ConfigError, TrainingFailed
from latentray.training import preflight
from latentray.training.state import Worker

RESULTS = {"autoencoder": "autoencoder", "diffusion": "model"}
"""The artifact each stage leaves in its run's folder."""


def train(config: Train) -> str:
    """Train to the end and return the URI of the result; continue where `run` names an unfinished run.

    Raises before any worker starts: InputMissing, DigestMismatch or FingerprintMismatch for data that cannot be used,
    ConfigError for settings that contradict each other, EnvironmentRefused for a full disk or W&B without a key.
    Raises TrainingFailed where the workers died more often than allowed.
    """
    run = config.run or new_run_id(config.stage.name)
    out = store.absolute(config.out or store.join("runs", run))
    result = store.join(out, RESULTS[config.stage.name])
    finished = manifest.find(result)
    if finished is not None:
        print(f"{run} is finished: {result}", flush=True)
        return result
    inputs = preflight.check(config, out)
    print(f"run {run} -> {out}")
    print(f"resume it with: {resume_command(run, out)}", flush=True)
    if config.cluster.kind == "none":
        _train_here(config, run, out)
    else:
        _train_on_ray(config, run, out)
    if int(os.environ.get("RANK", "0")) == 0:
        _seal_run(config, run, out, result, inputs)
    return result


def new_run_id(stage: str) -> str:
    """`<stage>-<date>-<time>-<four random hex digits>`."""
    return f"{stage}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def resume_command(run: str, out: str) -> str:
    """The command of this process, with the run's identity in it."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is None or not module.name.startswith("jobs.train"):
        return f"python -m jobs.train run={run} out={out} ... (with the same settings)"
    kept = [a for a in sys.argv[1:] if not a.startswith(("run=", "out="))]
    return " ".join(["python -m jobs.train", *kept, f"run={run}", f"out={out}"])


def _seal_run(config: Train, run: str, out: str, result: str, inputs: dict[str, str]) -> None:
    """The run's own manifest: what it was made from, with which settings, and what it made."""
    made = manifest.read(result)
    manifest.refuse_existing(out, replace=True)
    meta = {"run": run, "result": {"kind": made.kind, "uri": result, "digest": made.digest}, "facts": made.meta}
    manifest.seal(out, {}, kind="run", inputs=inputs, config=compose.to_dict(config), meta=meta)
    print(f"Result: {result}")
    if config.stage.name == "autoencoder":
        data = config.data or config.mixture.of[0].uri
        print(f"Next: python -m jobs.precompute_latents data={data} autoencoder_from={result} out=...", flush=True)
    else:
        print(f"Next: python -m jobs.evaluate model={result} data=...", flush=True)


def _train_here(config: Train, run: str, out: str) -> None:
    """One process, or one of torchrun's."""
    import torch.distributed as dist

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device_of_worker(config.cluster.device, int(os.environ.get("LOCAL_RANK", "0")))
    if world == 1:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", str(20_000 + os.getpid() % 20_000))
    timeout = datetime.timedelta(seconds=config.cluster.collective_timeout_s)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        _work(config, run, out, rank=rank, world=world, device=device, attempt=_shared_attempt(rank))
    finally:
        dist.destroy_process_group()


def _shared_attempt(rank: int) -> str:
    """One random name for all ranks of this attempt. Collective."""
    import torch.distributed as dist

    box = [secrets.token_hex(3) if rank == 0 else ""]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _device_of_worker(name: str, local_rank: int) -> torch.device:
    device = build.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return device


def _work(
    config: Train,
    run: str,
    out: str,
    *,
    rank: int,
    world: int,
    device: torch.device,
    attempt: str,
    on_checkpoint: Any = None,
) -> None:
    from latentray.training import loop

    threads = config.cluster.threads or max(int(config.cluster.cpus_per_worker), 1)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    worker = Worker(config=config, run=run, out=out, rank=rank, world=world, device=device, attempt=attempt)
    loop.run(worker, **({"on_checkpoint": on_checkpoint} if on_checkpoint else {}))


def _train_on_ray(config: Train, run: str, out: str) -> None:
    import ray
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from latentray.data import cluster

    cluster.connect(config.cluster.address)
    gpus = ray.cluster_resources().get("GPU", 0)
    if config.cluster.device == "cuda" and gpus < config.cluster.workers:
        raise ConfigError(
            f"{config.cluster.workers} workers want a GPU each; the cluster has {gpus:g}.",
            where="cluster.workers",
            mend="Lower cluster.workers, or set cluster.device=auto.",
        )
    use_gpu = config.cluster.device != "cpu" and gpus >= config.cluster.workers
    filesystem, path = store.filesystem(store.join(out, "ray"))
    trainer = TorchTrainer(
        functools.partial(_ray_worker, config=compose.to_dict(_absolute(config)), run=run, out=out),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(config.cluster.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        # A fresh name each time: our own manifests say where to resume, Ray's snapshot never does.
        run_config=RunConfig(
            name=f"{run}-{secrets.token_hex(3)}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        own = _own_error(error)
        if own is not None:
            raise own from None
        raise TrainingFailed(
            f"Training failed after {config.cluster.max_failures} restarts: {str(error).splitlines()[-1]}",
            where=out,
            mend=f"See the workers' output above, mend the cause and resume with run={run}.",
        ) from error
    store.delete(store.join(out, "ray"))


def _own_error(error: BaseException) -> Exception | None:
    from latentray.config.command import known_cause

    return known_cause(error)


def _absolute(config: Train) -> Train:
    """The same configuration with absolute inputs: workers start in a folder of their own."""
    changed: dict[str, Any] = {
        key: store.absolute(value)
        for key in ("data", "latents", "autoencoder_from")
        if (value := getattr(config, key)) is not None
    }
    mixture = [dataclasses.replace(one, uri=store.absolute(one.uri)) for one in config.mixture.of]
    return dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, of=mixture), **changed)


def _ray_worker(config: dict[str, Any], run: str, out: str) -> None:
    """What each Ray Train worker runs: the very loop that torchrun runs."""
    import ray.train
    from ray.train.v2.api.config import RunConfig  # noqa: F401  (fails early where Train v1 is active)

    typed = compose.from_dict(Train, config)
    context = ray.train.get_context()
    rank = context.get_world_rank()

    def on_checkpoint(uri: str, step: int) -> None:
        ray.train.report({"checkpoint": uri, "step": step})

    _work(
        typed,
        run,
        out,
        rank=rank,
        world=context.get_world_size(),
        device=_device_of_worker("cuda" if torch.cuda.is_available() else "cpu", context.get_local_rank()),
        attempt=_shared_attempt(rank),
        on_checkpoint=on_checkpoint,
    )
