"""The held-out denoising loss at eight fixed noise levels: cheap, smooth, and comparable from run to run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latentray import randomness
from latentray.conditioning.denoiser_inputs import size_of
from latentray.data import decode
from latentray.diffusion import losses, timesteps
from latentray.inference.sampling import TextToImage
from latentray.randomness import Purpose
from latentray.records import SampleId

LEVELS = 8
_BATCH = 64


@torch.inference_mode()
def loss(model: TextToImage, pictures_NHWC: np.ndarray, captions: Sequence[str], *, seed: int) -> dict[str, float]:
    """`heldout_loss.t<timestep>` for each level, and their mean `heldout_loss`; unweighted squared error.

    Noise is keyed by the picture's position, so two models see the same noise.
    """
    objective, schedule = model.model.objective, model.schedule
    levels = timesteps.fixed(schedule, LEVELS)
    sums = torch.zeros(LEVELS, dtype=torch.float64)
    for i in range(0, len(pictures_NHWC), _BATCH):
        part = pictures_NHWC[i : i + _BATCH]
        x = decode.to_tensor(part).to(model.device, model.dtype)
        x0 = model.model.scale.normalise(model.autoencoder.encode(x).mean_BChw.float())
        text = model.embed(captions[i : i + _BATCH])
        sizes = torch.tensor([size_of(*part.shape[1:3])] * len(part), device=model.device)
        ids = [SampleId(epoch=0, dataset=0, index=i + j) for j in range(len(part))]
        noise = randomness.normal(randomness.keys_of(seed, Purpose.NOISE, ids), x0.shape[1:]).to(model.device)
        for level in range(LEVELS):
            t = levels[level].repeat(len(part)).to(model.device)
            batch = losses.noised(objective, schedule, x0, noise, t)
            y = model.denoise(batch.x_BChw.to(model.dtype), batch.t_B, text, sizes)
            error = (y.float() - batch.target_BChw).square().flatten(1).mean(1)
            sums[level] += error.double().sum().cpu()
    means = (sums / len(pictures_NHWC)).tolist()
    named = {f"heldout_loss.t{int(t)}": value for t, value in zip(levels.tolist(), means, strict=True)}
    return named | {"heldout_loss": sum(means) / LEVELS}
