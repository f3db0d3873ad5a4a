"""Picture-to-picture and inpainting: what of a given picture enters the sampling, and where.

Picture-to-picture starts at alpha x_0 + sigma noise (Meng et al. 2022, SDEdit). Inpainting with a plain model writes the known
part of the latent, noised to the level at hand, back after every step (Lugmayr et al. 2022, equation 8); a model made for it
(Rombach et al. 2022, section 4.5) besides sees mask and masked picture as further channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentray.conditioning import beside
from latentray.diffusion.executor import Table
from latentray.errors import ConfigError
from latentray.inference.requests import SamplingRequest

if TYPE_CHECKING:
    from latentray.inference.sampling import TextToImage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """A request's picture and mask, in latents."""

    latent_Chw: Tensor | None
    mask_hw: Tensor | None
    """1 where to paint."""
    masked_Chw: Tensor | None
    """Latent of the picture with the part to paint blanked, for a model that takes it."""
    strength: float

    def begin(self, table: Table, noise_Chw: Tensor) -> Tensor:
        """The latent at the table's first row; pure noise where nothing is to be kept."""
        if self.latent_Chw is None or self.strength == 1:
            return noise_Chw
        return table.alpha * self.latent_Chw + table.sigma * noise_Chw

    def restore(self, x_Chw: Tensor, noise_Chw: Tensor, alpha: float, sigma: float) -> None:
        """Write the known part, noised to (alpha, sigma), into x, in place."""
        assert self.latent_Chw is not None and self.mask_hw is not None
        known = alpha * self.latent_Chw + sigma * noise_Chw
        x_Chw.copy_(torch.where(self.mask_hw > 0, x_Chw, known))

    def channels(self) -> Tensor:
        """(1 + C, h, w): mask and masked picture, in the order of Stable Diffusion's inpainting models."""
        assert self.mask_hw is not None and self.masked_Chw is not None
        return torch.cat([self.mask_hw[None], self.masked_Chw])


def encode_all(model: TextToImage, requests: Sequence[SamplingRequest]) -> list[Edit]:
    """What each request gives besides text; requests that share a picture and a mask share their latents."""
    found: dict[tuple[int, int, float], Edit] = {}
    for request in requests:
        if _key(request) not in found:
            found[_key(request)] = encode(model, request)
    return [found[_key(request)] for request in requests]


def _key(request: SamplingRequest) -> tuple[int, int, float]:
    return id(request.picture_HWC), id(request.mask_HW), request.strength


def encode(model: TextToImage, request: SamplingRequest) -> Edit:
    """What a request gives besides text. For a model that takes a mask, no mask means: paint everything."""
    picture, mask = request.picture_HWC, request.mask_HW
    painted = None if mask is None else np.asarray(mask) > 0
    latent = None if picture is None else model.encode(picture)
    masked = None
    if model.takes_mask:
        painted = np.ones((request.height, request.width), bool) if painted is None else painted
        base = np.zeros((*painted.shape, 3), np.uint8) if picture is None else picture
        masked = model.encode(base, painted)
    small = None
    if painted is not None:  # a latent pixel that touches the part to paint is painted
        wide = torch.from_numpy(painted.astype(np.float32))[None, None]
        small = F.max_pool2d(wide, model.downsampling)[0, 0].to(model.device)
    return Edit(
        latent_Chw=masked if latent is None else latent,
        mask_hw=small,
        masked_Chw=masked,
        strength=request.strength if picture is not None else 1.0,
    )


def channels(model: TextToImage, requests: Sequence[SamplingRequest], edits: Sequence[Edit]) -> Tensor | None:
    """(B, channels, h, w): what the model sees beside the noisy latents; None for a model that sees nothing more."""
    if model.takes_mask:
        return torch.stack([one.channels() for one in edits]).to(model.dtype)
    if model.makes_larger:
        shape = [side // model.downsampling for side in (requests[0].height, requests[0].width)]
        small = [model.pixels(one.small_HWC) for one in requests if one.small_HWC is not None]
        return torch.cat([beside.super_resolution(one, shape) for one in small])
    return None


def require_small(model: TextToImage, request: SamplingRequest) -> None:
    """Raise ConfigError unless a super-resolution model, and no other, gets a small picture, of its size."""
    factor, given = model.makes_larger, request.small_HWC
    if (given is not None) != bool(factor):
        raise ConfigError(
            "This model makes a small picture larger." if factor else "This model makes no picture larger.",
            where="small",
            mend="Give one." if factor else "Leave it out.",
        )
    if given is not None and tuple(side * factor for side in given.shape[:2]) != (request.height, request.width):
        raise ConfigError(
            f"The small picture is {given.shape[1]}x{given.shape[0]}, and {request.width}x{request.height} is to be drawn.",
            where="small",
            mend=f"Draw {given.shape[1] * factor}x{given.shape[0] * factor}.",
        )


def keep_outside(drawn_BHWC: np.ndarray, requests: Sequence[SamplingRequest]) -> np.ndarray:
    """The given pictures' own pixels wherever their masks say nothing is to be painted."""
    out = drawn_BHWC.copy()
    for i, request in enumerate(requests):
        if request.mask_HW is not None and request.picture_HWC is not None:
            known = np.asarray(request.mask_HW) == 0
            out[i][known] = request.picture_HWC[known]
    return out
