"""The quickstart's stages: each is the very call that its own job makes, and is announced as that job's command."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jobs import quickstart_report
from jobs.quickstart_client import Drawn, draw_captions
from latentray.checkpoint import store
from latentray.config import compose
from latentray.config.build_shards import BuildShards
from latentray.config.evaluate import Evaluate
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.promote import PromoteConfig
from latentray.config.quickstart import Quickstart
from latentray.config.serve import ServeConfig
from latentray.config.train import Train
from latentray.errors import AlreadyExists

MARKER = ".quickstart"
_NEEDED_BYTES = 2 << 30


def quickstart(config: Quickstart) -> None:
    """Run all stages and write `<out>/report.html` and `<out>/report.json`.

    Raises before any work: EnvironmentRefused for a port in use or a full disk, AlreadyExists where `out` holds something
    that is not an earlier quickstart's.
    """
    from serving import keys, launch
    from serving.greeting import greeting

    launch.require_free_port(config.serve.host, config.serve.port)
    out = _fresh_folder(config.out)
    stages = Stages(config, str(out))
    stages.run_all()
    key = keys.create(out / "api_key")
    with stages.timed("serve"):
        serve = stages.compose(
            "serve",
            ServeConfig,
            f"registry={out}/registry",
            f"host={config.serve.host}",
            f"port={config.serve.port}",
            f"key_hashes=[{keys.hash_of(key)}]",
            f"min_replicas={config.workers}",
            f"max_replicas={config.workers}",
            "threads=1",
            "max_batch_size=27",
            "max_queued_requests=256",
        )
        endpoint = launch.serve(serve, block=False)
    try:
        with stages.timed("draw"):
            drawn = stages.draw(endpoint.base_url, key)
        stages.report(drawn, release=endpoint.release.id)
        if config.keep_serving:
            told = greeting(endpoint.base_url, endpoint.release, with_key=True)
            print(f"\nThe endpoint stays up; the key is in {out}/api_key. Stop it with Ctrl-C.\n{told}")
            launch.wait_for_signal(endpoint)
    finally:
        endpoint.stop()


def training_workers(wanted: int, *, gpus: int) -> int:
    """How many train: one for each GPU at most, where there are any; else as many as wanted, on CPUs."""
    return min(wanted, gpus) or wanted


class Stages:
    """The stages' configurations, results and timings."""

    def __init__(self, config: Quickstart, out: str) -> None:
        self.config, self.out = config, out
        self.console = Console(highlight=False)
        self.began = time.time()
        self.timings: dict[str, float] = {}
        if started := os.environ.get("LATENTRAY_MAKE_STARTED"):  # make's clock: it counts the installation
            self.timings["install"] = max(self.began - float(started), 0.0)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.time()
        yield
        self.timings[name] = time.time() - begin
        self.console.print(f"{name}: {self.timings[name]:.0f} s", style="dim")

    def compose(self, job: str, schema: type, *overrides: str) -> Any:
        """A job's configuration; its command is printed, so that a user can repeat the stage alone."""
        shown = [o for o in overrides if not o.startswith("key_hashes=")]
        self.console.print(f"\n$ python -m jobs.{job} {shlex.join(shown)}", style="bold", markup=False, soft_wrap=True)
        return compose.load(job, schema, overrides)

    def run_all(self) -> None:
        """Shards, autoencoder, latents, denoiser, evaluation, promotion."""
        from latentray.data import precompute, shard_building
        from latentray.evaluation import suite
        from latentray.registry import promotion
        from latentray.training import launch

        config, out, scale = self.config, self.out, self.config.scale
        seed = f"seed={config.seed}"
        with self.timed("shards"):
            counts = [f"source.n={scale.pictures}", f"source.n_validation={scale.validation_pictures}"]
            shard_building.build(
                self.compose("build_shards", BuildShards, "source=shapes", f"out={out}/data", *counts, seed)
            )
        with self.timed("autoencoder"):
            late = [
                f"stage.lpips.start_samples={int(scale.autoencoder_samples * 0.95)}",
                f"stage.discriminator.start_samples={int(scale.autoencoder_samples * 0.98)}",
            ]
            launch.train(
                self._train("shapes_autoencoder", "autoencoder", f"data={out}/data", scale.autoencoder_samples, late)
            )
        with self.timed("latents"):
            encoder = [f"text_encoder.source={out}/text_encoder", "text_encoder=tiny"]
            inputs = [f"data={out}/data", f"autoencoder_from={out}/autoencoder/autoencoder", f"out={out}/latents"]
            precompute.precompute(self.compose("precompute_latents", PrecomputeLatents, *inputs, *encoder))
        with self.timed("denoiser"):
            steps = [f"stage.sampling_steps={scale.steps}"]
            launch.train(
                self._train("shapes_diffusion", "denoiser", f"latents={out}/latents", scale.diffusion_samples, steps)
            )
        with self.timed("evaluate"):
            suite.evaluate(
                self.compose(
                    "evaluate",
                    Evaluate,
                    f"model={out}/denoiser/model",
                    f"data={out}/data",
                    f"out={out}/evaluation",
                    f"per_kind={scale.evaluate_per_kind}",
                    f"per_unseen_kind={max(scale.per_unseen_caption // 4, 1)}",
                    "heldout_samples=256",
                    seed,
                )
            )
        with self.timed("promote"):
            promotion.promote(
                self.compose(
                    "promote",
                    PromoteConfig,
                    f"model={out}/denoiser/model",
                    f"report={out}/evaluation",
                    f"registry={out}/registry",
                    f"gates={scale.gates}",
                    "license=apache-2.0",
                )
            )

    def _train(self, experiment: str, run: str, data: str, samples: int, extra: Sequence[str]) -> Train:
        return self.compose(
            "train",
            Train,
            f"experiment={experiment}",
            data,
            f"run=quickstart-{run}",
            f"out={self.out}/{run}",
            f"total_samples={samples}",
            f"cluster.workers={training_workers(self.config.workers, gpus=torch.cuda.device_count())}",
            f"seed={self.config.seed}",
            *extra,
        )

    def draw(self, base_url: str, key: str) -> list[Drawn]:
        scale = self.config.scale
        return draw_captions(
            base_url, key, per_caption=scale.per_caption, per_unseen=scale.per_unseen_caption, seed=self.config.seed
        )

    def report(self, drawn: list[Drawn], *, release: str) -> None:
        """Write the report and print where it is."""
        begin = time.time()
        self.timings["report"] = 0.0
        total = time.time() - self.began + self.timings.get("install", 0.0)
        path = quickstart_report.write(
            Path(self.out), self.config, drawn, release=release, timings=self.timings, total_seconds=total, began=begin
        )
        port = self.config.serve.port
        self.console.print(f"\nReport: {path}", style="bold green", soft_wrap=True)
        self.console.print("Next:")
        for command in quickstart_report.next_commands(self.out, port):
            self.console.print(f"  {command}", markup=False, soft_wrap=True)


def _fresh_folder(out: str) -> Path:
    """An empty folder; an earlier quickstart's is replaced, anything else is refused."""
    path = store.local_path(store.absolute(out))
    if path.exists() and any(path.iterdir()):
        if not (path / MARKER).exists():
            raise AlreadyExists(
                "The folder is not empty, and not an earlier quickstart's.",
                where=str(path),
                mend="Choose another out=...",
            )
        shutil.rmtree(path)
    store.require_space(path, _NEEDED_BYTES)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).write_text("Made by python -m jobs.quickstart; a new quickstart replaces this folder.\n")
    return path
