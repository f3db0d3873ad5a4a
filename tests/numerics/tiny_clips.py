"""Moving shapes, and their latents by the tiny encoders: what a video denoiser learns from, so small that it takes a second."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from latentray.checkpoint import manifest
from latentray.config.precompute_latents import ClipConfig
from latentray.data import index, shards, synthetic_clips

FRAMES, FPS = 4, 8.0
N = 24

VIDEO = [
    "denoiser=video_tiny", "denoiser.channels=[16,16]", "denoiser.groups=4", "denoiser.heads=null", "denoiser.head_dim=8",
    "denoiser.linear_projection=true", "stage.sampling_steps=3",
]  # fmt: skip


def settings(tiny: ModuleType, *more: str) -> list[str]:
    """Of a run of stage 2 on clips."""
    return [*(one for one in tiny.STAGE2 if not one.startswith("denoiser")), *VIDEO, *more]


def write_data(root: Path) -> str:
    for split, count in (("train", N), ("validation", 4)):
        folder = root / f"built-{split}"
        folder.mkdir(parents=True)
        drawn = synthetic_clips.samples(split, seed=0, count=count, frames=2 * FRAMES, fps=FPS)
        index.write([shards.write_shard(drawn, folder / shards.shard_name(0))], folder / index.NAME)
        manifest.publish(folder, str(root / "clips" / split), kind="dataset")
    return str(root / "clips")


def build_all(root: Path, monkeypatch, tiny: ModuleType, encoders: dict[str, str]) -> dict[str, str]:
    """`data` and `latents` of clips, by the encoders that `tiny.build_all` wrote."""
    data = write_data(root)
    latents = tiny.write_latents(
        root, monkeypatch, data=data, autoencoder=encoders["autoencoder"], text_source=encoders["text_encoder"],
        clip=ClipConfig(frames=FRAMES, fps=FPS),
    )  # fmt: skip
    return {"data": data, "latents": latents}
