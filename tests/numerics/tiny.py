"""A data set, an autoencoder, a text encoder and latents so small that a training run takes a second."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from PIL import Image

from latentray import build
from latentray.checkpoint import manifest
from latentray.conditioning import tiny_text_encoder
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig, TinyTextEncoderConfig
from latentray.data import index, latent_parts, latent_shards, precompute, shards, synthetic
from latentray.data.latent_encoder import Encoder
from latentray.models.autoencoder import KLAutoencoder, LatentScale

N, SIZE = 64, 64
AUTOENCODER = AutoencoderConfig(channels=[16], blocks=1, patch=8, attention=False, groups=4)
TEXT = TinyTextEncoderConfig(width=16, layers=1, heads=2, max_tokens=12, vocabulary=300)

SMALL = [
    "autoencoder=shapes_f8", "autoencoder.channels=[16]", "autoencoder.groups=4",
    "denoiser=unet_shapes", "denoiser.channels=[16,16]", "denoiser.groups=4", "denoiser.head_dim=8",
    "denoiser.context_width=16", "objective=v", "size=64", "global_batch_size=8", "total_samples=48",
    "log_every_samples=8", "checkpoint_every_samples=0", "ema_half_life_samples=64", "precision=fp32",
    "optimizer.lr=0.002", "optimizer.warmup_samples=16", "cluster=none", "tracking=none", "cluster.device=cpu",
]  # fmt: skip
STAGE1 = [
    *SMALL, "stage=autoencoder", "stage.lpips.weight=0", "stage.discriminator.channels=8", "stage.discriminator.layers=1",
    "stage.discriminator.start_samples=0", "stage.kl_weight=0.0001",
]  # fmt: skip
STAGE2 = [
    *SMALL, "stage=diffusion", "stage.caption_dropout=0.3", "stage.latent=draw", "objective.timestep_spread=sobol",
    "objective.offset_noise=0.1",
]  # fmt: skip


def write_pictures(root: Path, split: str, n: int, per_shard: int = 24) -> str:
    """Shards of the drawn set, written in this process; the data set's URI."""
    folder = root / f"built-{split}"
    folder.mkdir(parents=True)

    def sample(i: int) -> shards.Sample:
        kind = synthetic.kind_of(split, i)
        buffer = io.BytesIO()
        Image.fromarray(synthetic.draw(kind, 0, i, split=split)).save(buffer, "PNG", compress_level=1)
        caption = synthetic.caption(kind)
        about = json.dumps({"captions": [caption], "width": SIZE, "height": SIZE}).encode()
        return shards.Sample(
            key=f"{i:09d}",
            members={"png": buffer.getvalue(), "txt": caption.encode(), "json": about},
            columns={"width": SIZE, "height": SIZE},
        )

    cuts = range(0, n, per_shard)
    made = [
        shards.write_shard(map(sample, range(a, min(a + per_shard, n))), folder / shards.shard_name(k))
        for k, a in enumerate(cuts)
    ]
    index.write(made, folder / index.NAME)
    uri = str(root / "data" / split)
    manifest.publish(folder, uri, kind="dataset")
    return uri


def write_autoencoder(uri: str, *, seed: int = 0, scale: float = 2.0) -> str:
    folder = Path(f"{uri}-built")
    folder.mkdir(parents=True)
    net = build.seeded(lambda: KLAutoencoder(AUTOENCODER), seed)
    build.write_autoencoder(folder, AUTOENCODER, net.state_dict(), scale=LatentScale(shift=0.1, scale=scale), size=SIZE)
    manifest.publish(folder, uri, kind="autoencoder")
    return uri


def write_text_encoder(uri: str) -> str:
    tiny_text_encoder.publish(uri, [synthetic.caption(kind) for kind in synthetic.KINDS], TEXT)
    return uri


def write_latents(root: Path, monkeypatch, *, data: str, autoencoder: str, text_source: str) -> str:
    """The whole precompute job, the stages of its Ray graph one after another in this process."""

    def in_process(config, job, work):
        encoder = Encoder(job)
        for one in work:
            names = dict(one.written)
            for part in one.left:
                parcel = latent_parts.Parcel.from_table(latent_parts.read_part(job, part).to_table())
                names[part.number] = latent_shards.write_part(job, encoder.encode(parcel))
            latent_shards.assemble(job, one.split, one.name, [names[number] for number in sorted(names)])
            yield one

    monkeypatch.setattr(precompute, "_run", in_process)
    out = str(root / "latents")
    precompute.precompute(
        PrecomputeLatents(
            data=data, autoencoder_from=autoencoder, out=out, batch_size=16, text_dtype="float32", device="cpu",
            text_encoder=TextEncoderConfig(source=text_source),
        )
    )  # fmt: skip
    return out


def build_all(root: Path, monkeypatch) -> dict[str, str]:
    """Everything a run of either stage reads: `data`, `autoencoder`, `text_encoder`, `latents`."""
    torch.set_num_threads(1)
    write_pictures(root, "train", N)
    write_pictures(root, "validation", 12)
    found = {
        "data": str(root / "data"),
        "autoencoder": write_autoencoder(str(root / "autoencoder")),
        "text_encoder": write_text_encoder(str(root / "text_encoder")),
    }
    found["latents"] = write_latents(
        root, monkeypatch, data=found["data"], autoencoder=found["autoencoder"], text_source=found["text_encoder"]
    )
    return found
