"""One model hands over to another in the middle of the sampling: SDXL's base and refiner (Podell et al. 2023, section 2.5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from latentray.diffusion import spacing
from latentray.errors import ConfigError, FingerprintMismatch
from latentray.inference.requests import SamplingRequest
from latentray.inference.sampling import TextToImage


@torch.inference_mode()
def latents(base: TextToImage, refiner: TextToImage, requests: Sequence[SamplingRequest], *, at: float) -> Tensor:
    """Latents that `base` begins and `refiner` ends, (B,C,h,w) float32; `refiner.decode` makes them pictures.

    Args:
        at: noise level sigma/(alpha + sigma) in (0, 1), at which the refiner takes over; SDXL's refiner knows those below 0.2
            of the timesteps.

    Raises FingerprintMismatch where the two do not share schedule and latent space, ConfigError for a level that leaves one
    of them nothing to do.
    """
    _require_kindred(base, refiner)
    if any(request.picture_HWC is not None for request in requests):
        raise ConfigError(
            "A refiner ends what was begun from text, not an edit.", where="picture", mend="Leave out one of the two."
        )
    stops = {hand_over(base, request, at=at) for request in requests}
    if len(stops) != 1:
        raise ConfigError("The requests of one batch hand over at different steps.", where="steps", mend="Give one.")
    stop = stops.pop()
    halfway = base.latents(requests, start=0, stop=stop)
    return refiner.latents(requests, start=stop, begin_with=halfway)


def hand_over(model: TextToImage, request: SamplingRequest, *, at: float) -> int:
    """The first interval of a request's steps whose noise level is `at` or less."""
    grid = spacing.grid(model.schedule, request.steps, request.spacing or model.defaults.spacing)
    share = grid.sigma / (grid.alpha + grid.sigma)
    stop = int((share[: grid.steps] > at).sum())
    if not 0 < stop < grid.steps:
        raise ConfigError(
            f"At noise level {at} the hand-over leaves {stop} of {grid.steps} steps to the first model.",
            where="at",
            mend="Choose a level between 0 and 1, or more steps.",
        )
    return stop


def _require_kindred(base: TextToImage, refiner: TextToImage) -> None:
    same_objective = dataclasses.replace(base.model.objective, offset_noise=0.0) == dataclasses.replace(
        refiner.model.objective, offset_noise=0.0
    )
    if not same_objective or base.model.scale != refiner.model.scale:
        raise FingerprintMismatch(
            "Base and refiner must share schedule, prediction and latent space.",
            where="refiner",
            mend="Train both on the same latents with the same objective.",
        )
