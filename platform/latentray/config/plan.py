"""Settings of `python -m jobs.plan`: those of a training run, and what it is to run on."""

from __future__ import annotations

import dataclasses

from latentray.config.train import Train
from latentray.errors import ConfigError

GPUS = ("h100", "h200", "a100-80", "a100-40", "l40s", "rtx4090", "cpu")


@dataclasses.dataclass(kw_only=True)
class PlanConfig(Train):
    """What a training run will take: memory per worker, largest micro-batch, hours, money, checkpoints."""

    gpu: str = "h100"
    """h100, h200, a100-80, a100-40, l40s, rtx4090, or cpu: this machine."""
    gpus: int | None = None
    """How many of them; null is cluster.workers."""
    price_per_gpu_hour: float | None = None
    """null is an order of size of what clouds ask."""
    mfu: float = 0.3
    """Share of the GPUs' peak that training reaches: an assumption, until `measured` says better."""
    measured: str | None = None
    """Throughput that was measured: samples per second of the whole run, or the metrics.jsonl (or folder) of one."""
    headroom: float = 0.08
    """Share of the memory that is left free, for fragmentation."""
    text_tokens: int = 77
    """Text tokens of each caption."""
    clip_frames: int = 16
    """Frames of each clip, for a video denoiser."""
    gpu_hours_between_failures: float = 50000.0
    """Mean hours of one GPU between failures that end a run: 419 in 54 days on 16,384 of them (Llama team 2024, section
    3.3.4). With instances that are taken away, their lifetime."""
    storage_gb_per_s: float = 1.0
    """How fast checkpoints are written, by all workers together."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu not in GPUS:
            raise ConfigError(f"There is no GPU {self.gpu!r}.", where="gpu", mend=f"Known: {', '.join(GPUS)}.")
        for key, most in (("mfu", 1.0), ("headroom", 0.9)):
            if not 0 < getattr(self, key) <= most:
                raise ConfigError(
                    f"{key} is {getattr(self, key)}.", where=key, mend=f"Give a share above 0 and at most {most:g}."
                )
        for key in ("text_tokens", "clip_frames", "gpu_hours_between_failures", "storage_gb_per_s"):
            if getattr(self, key) <= 0:
                raise ConfigError("It must be positive.", where=key, mend=f"Raise {key}.")
        if self.price_per_gpu_hour is not None and self.price_per_gpu_hour < 0:
            raise ConfigError("A price is not negative.", where="price_per_gpu_hour", mend="Give 0 or more.")
        if self.workers < 1:
            raise ConfigError("At least one GPU is wanted.", where="gpus", mend="Raise gpus.")
        self._check_size()
        self.require_divisible(self.workers)

    def _check_size(self) -> None:
        """As stage 1 and `buckets` check their own: other latents are planned as those of squares of `size`."""
        factor = self.autoencoder.downsampling
        of_pictures = self.stage.name != "autoencoder" and self.denoiser.family != "policy"
        if of_pictures and not self.buckets.sizes and self.size % factor:
            raise ConfigError(
                f"Pictures of {self.size} pixels do not divide by the autoencoder's factor {factor}.",
                where="size",
                mend=f"Choose a multiple of {factor}.",
            )
        if of_pictures and not self.buckets.sizes:
            self.denoiser.require_shapes([(self.size, self.size)], factor)

    @property
    def workers(self) -> int:
        return self.cluster.workers if self.gpus is None else self.gpus
