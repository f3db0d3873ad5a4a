"""The card of an autoencoder: what it cannot reconstruct, no denoiser on it will ever draw."""

from __future__ import annotations

import numpy as np
import torch

from latentray.data import decode, members
from latentray.data.inspection import spread
from latentray.data.latents import LABEL
from latentray.data.shards import IndexedShards
from latentray.evaluation import metrics
from latentray.evaluation.feature_networks import FeatureNetwork
from latentray.models.autoencoder import Autoencoder
from latentray.models.perceptual import Perceptual
from latentray.models.quantizer import perplexity

_BATCH = 48


def load_pictures(shards: IndexedShards, size: int, *, limit: int) -> np.ndarray:
    """Up to `limit` pictures spread over a data set, uint8 (N, size, size, 3)."""
    rows = spread(shards.count, limit)
    return np.stack([decode.to_square(members.picture_of(members.decode_sample(shards.read(x))), size) for x in rows])


def load_captions(shards: IndexedShards, *, limit: int) -> list[str]:
    """The first caption of the same pictures as `load_pictures` gives."""
    rows = spread(shards.count, limit)
    return [members.captions_of(members.decode_sample(shards.read(x)))[0] for x in rows]


def load_labels(shards: IndexedShards, *, limit: int) -> list[int]:
    """The class labels of the same pictures, -1 where there are none."""
    rows = spread(shards.count, limit)
    return shards.index.numbers(LABEL)[rows].tolist() if LABEL in shards.columns else [-1] * len(rows)


@torch.inference_mode()
def measure(
    net: Autoencoder,
    originals_NHWC: np.ndarray,
    *,
    perceptual: Perceptual | None,
    network: FeatureNetwork,
    device: torch.device,
) -> tuple[dict[str, float], np.ndarray]:
    """(psnr, ssim, of two or more pictures rfid, with a perceptual net lpips, of a codebook usage and perplexity; the
    reconstructions uint8).

    PSNR is the mean over pictures of 10 log10(1/MSE), values in [0, 1]; the posterior's mean is decoded.
    """
    psnr, ssim, lpips, rebuilt = [], [], [], []
    used = torch.zeros(net.config.codebook_size or 0, dtype=torch.long)
    for i in range(0, len(originals_NHWC), _BATCH):
        x = decode.to_tensor(originals_NHWC[i : i + _BATCH]).to(device)
        y, _, about, *_ = net(x)
        y = y.clamp(-1, 1)
        if len(used):
            used += about.flatten().cpu().bincount(minlength=len(used))
        psnr.append(metrics.psnr((x + 1) / 2, (y + 1) / 2).cpu())
        ssim.append(metrics.ssim((x + 1) / 2, (y + 1) / 2).cpu())
        if perceptual is not None:
            lpips.append(perceptual(x, y).cpu())
        rebuilt.append(((y + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    pictures = np.concatenate(rebuilt)
    card = {"psnr": float(torch.cat(psnr).mean()), "ssim": float(torch.cat(ssim).mean())}
    if len(pictures) >= 2:  # one picture has no covariance
        card["rfid"] = metrics.frechet_distance(network.features_of(originals_NHWC), network.features_of(pictures))
    if len(used):
        card["codebook_usage"] = float((used > 0).double().mean())
        card["codebook_perplexity"] = float(perplexity(used))
    if lpips:
        card["lpips"] = float(torch.cat(lpips).mean())
    return card, pictures
