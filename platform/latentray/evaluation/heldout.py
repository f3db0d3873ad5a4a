"""The held-out denoising loss at eight fixed noise levels: cheap, smooth, and comparable from run to run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latentray import randomness
from latentray.conditioning import beside
from latentray.conditioning.denoiser_inputs import size_of
from latentray.data import decode
from latentray.diffusion import losses, timesteps, variance
from latentray.inference.sampling import TextToImage
from latentray.randomness import Purpose
from latentray.records import SampleId

LEVELS = 8
_BATCH = 64


@torch.inference_mode()
def loss(
    model: TextToImage,
    pictures_NHWC: np.ndarray,
    captions: Sequence[str],
    *,
    seed: int,
    labels: Sequence[int] | None = None,
) -> dict[str, float]:
    """`heldout_loss.t<timestep>` for each level, and their mean `heldout_loss`; unweighted squared error.

    Noise is keyed by the picture's position, so two models see the same noise. Clips, (N,T,H,W,3), are taken alike.
    """
    objective, schedule = model.model.objective, model.schedule

    def encode(x_BCHW: torch.Tensor) -> torch.Tensor:
        mean = model.autoencoder.encode(x_BCHW.flatten(0, -4)).mean_BChw.float()  # a clip's frames one by one
        return model.model.scale.normalise(mean.unflatten(0, x_BCHW.shape[:-3]))

    levels = timesteps.fixed(schedule, LEVELS)
    sums = torch.zeros(LEVELS, dtype=torch.float64)
    step = max(_BATCH // (model.frames or 1), 1)
    for i in range(0, len(pictures_NHWC), step):
        part = pictures_NHWC[i : i + step]
        x = decode.to_tensor(part).to(model.device, model.dtype)
        x0 = encode(x)
        ids = [SampleId(epoch=0, dataset=0, index=i + j) for j in range(len(part))]
        keys = randomness.keys_of(seed, Purpose.MASK, ids, device=model.device)
        channels = beside.of_pictures(model.model.beside, x, keys, encode, x0.shape[-2:])
        sizes = [size_of(*part.shape[-3:-1])] * len(part)
        classes = None if labels is None else labels[i : i + step]
        likes = list(part) if model.takes_like else None
        told = model.told(captions[i : i + step], sizes, labels=classes, likes=likes, channels_BChw=channels)
        noise = randomness.normal(randomness.keys_of(seed, Purpose.NOISE, ids), x0.shape[1:]).to(model.device)
        for level in range(LEVELS):
            t = levels[level].repeat(len(part)).to(model.device)
            batch = losses.noised(objective, schedule, x0, noise, t)
            y, _ = variance.split(objective, told.call(model.denoiser, batch.x_BChw.to(model.dtype), batch.t_B))
            error = (y.float() - batch.target_BChw).square().flatten(1).mean(1)
            sums[level] += error.double().sum().cpu()
    means = (sums / len(pictures_NHWC)).tolist()
    named = {f"heldout_loss.t{int(t)}": value for t, value in zip(levels.tolist(), means, strict=True)}
    return named | {"heldout_loss": sum(means) / LEVELS}
