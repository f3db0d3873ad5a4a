"""What stage 1 leaves: an autoencoder with its measured latent scale and its card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.data import decode, members
from latentray.data.shards import IndexedShards
from latentray.evaluation import autoencoders, feature_networks
from latentray.models.autoencoder import Autoencoder, LatentScale
from latentray.models.perceptual import Perceptual
from latentray.reporting import pictures
from latentray.tracking import names
from latentray.training.state import Worker

_SCALE_SAMPLES = 2048
_VALIDATION_SAMPLES = 2048
_GRID = 24
_MEASURED = {
    "rfid": names.VALIDATION_RFID,
    "lpips": names.VALIDATION_LPIPS,
    "codebook_usage": names.VALIDATION_CODEBOOK_USAGE,
    "codebook_perplexity": names.VALIDATION_CODEBOOK_PERPLEXITY,
}
"""What a card may have besides PSNR and SSIM."""
_TOLD = {"rfid": ("rFID", 2), "codebook_usage": ("codebook in use", 3), "codebook_perplexity": ("perplexity", 1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """An artifact that a run made, and what to tell the tracker of it."""

    kind: str
    uri: str
    digest: str
    inputs: dict[str, str]
    metrics: dict[str, float]
    pictures: dict[str, np.ndarray]
    meta: dict[str, Any]


def autoencoder(
    worker: Worker,
    state: Mapping[str, Tensor],
    training: IndexedShards,
    validation_uri: str,
    *,
    perceptual: Perceptual | None,
    inputs: Mapping[str, str],
    facts: Mapping[str, object],
    encoder_of: build.AutoencoderArtifact | None = None,
) -> Exported:
    """Measure the latent scale and the card of the averaged weights, and publish the artifact `<out>/autoencoder`.

    Args:
        encoder_of: the autoencoder whose encoder this is, unchanged: its latents, and so its scale, are those of the new one.
    """
    config = worker.config
    net = build.autoencoder(config.autoencoder, state).to(worker.device)
    scale = encoder_of.scale if encoder_of else latent_scale(net, training, config.size, worker.device)
    held_out = validation_uri if store.exists(store.join(validation_uri, manifest.NAME)) else training.uri
    validation = IndexedShards.open(held_out)
    originals = autoencoders.load_pictures(validation, config.size, limit=_VALIDATION_SAMPLES)
    network = feature_networks.of_dataset(
        store.join(store.parent(training.uri), "feature_network"), training, config.size
    )
    card, rebuilt = autoencoders.measure(net, originals, perceptual=perceptual, network=network, device=worker.device)
    shown = autoencoders.spread(len(originals), _GRID)
    grid = pictures.pairs(originals[shown], rebuilt[shown], columns=8, scale=2 if config.size <= 128 else 1)
    meta: dict[str, Any] = {
        "figures": card,
        "scale": dataclasses.asdict(scale),
        "samples": len(originals),
        "feature_network": {"name": network.name, "digest": network.digest, "resize": network.resize},
        "run": worker.run,
        **facts,
    }
    uri = store.join(worker.out, "autoencoder")
    with store.staging() as folder:
        build.write_autoencoder(
            folder,
            config.autoencoder,
            state,
            scale=scale,
            size=config.size,
            fingerprint=encoder_of.fingerprint if encoder_of else None,
        )
        pictures.save_png(grid, folder / "reconstructions.png", {"run": worker.run, "psnr": f"{card['psnr']:.2f} dB"})
        listing = manifest.publish(
            folder, uri, kind="autoencoder", inputs=inputs, config=compose.to_dict(config), meta=meta, replace=True
        )
    told = "".join(f", {text} {card[figure]:.{digits}f}" for figure, (text, digits) in _TOLD.items() if figure in card)
    print(f"autoencoder: PSNR {card['psnr']:.2f} dB, SSIM {card['ssim']:.3f}{told}", flush=True)
    metrics = {
        names.VALIDATION_PSNR: card["psnr"],
        names.VALIDATION_SSIM: card["ssim"],
        names.LATENT_SHIFT: scale.shift,
        names.LATENT_SCALE: scale.scale,
    }
    for figure, name in _MEASURED.items():
        if figure in card:
            metrics[name] = card[figure]
    return Exported(
        kind="autoencoder",
        uri=uri,
        digest=listing.digest,
        inputs=dict(inputs),
        metrics=metrics,
        pictures={names.PICTURES_RECONSTRUCTIONS: np.asarray(grid)},
        meta=meta,
    )


@torch.inference_mode()
def latent_scale(net: Autoencoder, training: IndexedShards, size: int, device: torch.device) -> LatentScale:
    """Mean and 1/standard deviation of the posterior means over training pictures, spread over the data set."""
    rows = autoencoders.spread(training.count, _SCALE_SAMPLES)
    latents = []
    for i in range(0, len(rows), 64):
        pixels = [
            decode.to_square(members.picture_of(members.decode_sample(training.read(x))), size)
            for x in rows[i : i + 64]
        ]
        latents.append(net.encode(decode.to_tensor(np.stack(pixels)).to(device)).mean_BChw.double().cpu())
    joined = torch.cat(latents)
    return LatentScale(shift=float(joined.mean()), scale=float(1 / joined.std()))
