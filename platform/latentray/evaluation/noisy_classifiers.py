"""How well a classifier of noisy latents does on latents that it was not trained on, at each noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from latentray import randomness
from latentray.config.objective import ObjectiveConfig
from latentray.data import decode, latents, members
from latentray.data.inspection import spread
from latentray.data.shards import IndexedShards
from latentray.diffusion import losses, schedules, timesteps
from latentray.errors import DataError, DigestMismatch
from latentray.evaluation import autoencoders
from latentray.models.autoencoder import Autoencoder, LatentScale
from latentray.models.noisy_classifier import NoisyClassifier
from latentray.randomness import Purpose
from latentray.records import LATENT_MEMBER, PICTURE_SUFFIXES, SampleId

LEVELS = 9
"""Three in each third."""
_BATCH = 64

Labelled = list[tuple[Tensor, int]]
"""(normalised latent (C,h,w), its class) each."""


def stored(shards: IndexedShards, scale: LatentScale, *, limit: int) -> Labelled:
    """Up to `limit` posterior means of a latent store that have a label, spread over it; damaged ones are left out."""
    labels, found = autoencoders.load_labels(shards, limit=limit), []
    for x, label in zip(spread(shards.count, limit), labels, strict=True):
        if label < 0:
            continue
        try:
            record = members.decode_sample(shards.read(x), as_bytes=PICTURE_SUFFIXES)[LATENT_MEMBER]
        except (DataError, DigestMismatch):
            continue
        found.append((scale.normalise(record["mean"].float()), label))
    return found


@torch.inference_mode()
def encoded(
    shards: IndexedShards, net: Autoencoder, scale: LatentScale, *, size: int, limit: int, device: torch.device
) -> Labelled:
    """The same of pictures, resized and cut to a square of `size` and encoded."""
    labels = autoencoders.load_labels(shards, limit=limit)
    pixels = autoencoders.load_pictures(shards, size, limit=limit)
    found = []
    for i in range(0, len(pixels), _BATCH):
        means = net.encode(decode.to_tensor(pixels[i : i + _BATCH]).to(device)).mean_BChw.float().cpu()
        found += list(zip(scale.normalise(means), labels[i : i + _BATCH], strict=True))
    return [one for one in found if one[1] >= 0]


def is_latents(shards: IndexedShards) -> bool:
    return shards.manifest.kind == latents.KIND


@torch.inference_mode()
def measure(
    net: NoisyClassifier, objective: ObjectiveConfig, samples: Sequence[tuple[Tensor, int]], *, seed: int
) -> dict[str, float]:
    """`loss` (cross-entropy) and `accuracy` over nine fixed noise levels, and `accuracy_at_low`, `..._middle`, `..._high`.

    Noise is keyed by a sample's position, so two classifiers see the same. Empty without samples.
    """
    if not samples:
        return {}
    schedule = schedules.build(objective)
    levels = timesteps.fixed(schedule, LEVELS)
    device = next(net.parameters()).device
    loss, hits = torch.zeros(LEVELS, dtype=torch.float64), torch.zeros(LEVELS, dtype=torch.float64)
    for rows in _batches([x0.shape for x0, _ in samples]):
        x0 = torch.stack([samples[row][0] for row in rows]).to(device)
        labels = torch.tensor([samples[row][1] for row in rows], device=device)
        ids = [SampleId(epoch=0, dataset=0, index=row) for row in rows]
        noise = randomness.normal(randomness.keys_of(seed, Purpose.NOISE, ids, device=device), x0.shape[1:])
        for level in range(LEVELS):
            t = levels[level].repeat(len(rows)).to(device)
            logits = net(losses.noised(objective, schedule, x0, noise, t).x_BChw, t).float()
            loss[level] += F.cross_entropy(logits, labels, reduction="sum").double().cpu()
            hits[level] += (logits.argmax(dim=1) == labels).sum().cpu()
    accuracy, thirds = hits / len(samples), timesteps.third(schedule, levels)
    found = {"loss": float(loss.mean()) / len(samples), "accuracy": float(accuracy.mean())}
    for number, name in enumerate(timesteps.THIRDS):
        found[f"accuracy_at_{name}"] = float(accuracy[thirds == number].mean())
    return found


def _batches(shapes: Sequence[torch.Size]) -> list[list[int]]:
    """Positions of latents of one shape, no more of them than go at once."""
    of_shape: dict[torch.Size, list[int]] = {}
    for row, shape in enumerate(shapes):
        of_shape.setdefault(shape, []).append(row)
    return [rows[i : i + _BATCH] for rows in of_shape.values() for i in range(0, len(rows), _BATCH)]
