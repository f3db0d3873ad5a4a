"""Spatial conditions: what is set beside the noisy latent, channel by channel (Rombach et al. 2022, sections 4.4 and 4.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from latentray import randomness
from latentray.config.beside import BesideConfig

BLANK = 0.0
"""What stands in a picture in [-1, 1] where a mask covers it: the middle of the range."""
_WHOLE = 0.25
"""Share of masks that cover everything, so that the model also draws from text alone, as Stable Diffusion's does."""
_MOST = 4
_SIDES = (0.1, 0.6)


def masks(keys_B: Tensor, height: int, width: int) -> Tensor:
    """(B,1,H,W) float32, 1 where to paint: one to four rectangles of a tenth to six tenths of a side each, or everything.

    A function of the keys alone, which belong to the samples (`randomness.keys_of`).
    """
    draws = randomness.uniform(keys_B, (2 + 4 * _MOST,))
    count = 1 + (draws[:, 1] * _MOST).long()
    boxes = draws[:, 2:].view(-1, _MOST, 4)
    sides = _SIDES[0] + (_SIDES[1] - _SIDES[0]) * boxes[..., :2]
    begin = boxes[..., 2:] * (1 - sides)
    rows = _covered(begin[..., 0], sides[..., 0], height)  # (B, boxes, H)
    columns = _covered(begin[..., 1], sides[..., 1], width)
    used = torch.arange(_MOST, device=keys_B.device) < count[:, None]
    inside = (rows[..., :, None] & columns[..., None, :] & used[..., None, None]).any(1)
    everything = (draws[:, 0] < _WHOLE)[:, None, None]
    return (inside | everything)[:, None].float()


def _covered(begin: Tensor, side: Tensor, pixels: int) -> Tensor:
    """Which of so many pixels lie in [begin, begin + side), as shares of them; at least one does."""
    first = (begin * pixels).floor()[..., None]
    last = torch.maximum(((begin + side) * pixels).ceil()[..., None], first + 1)
    at = torch.arange(pixels, device=begin.device)
    return (at >= first) & (at < last)


def without(x_BCHW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """The pictures, blank where they are to be painted."""
    return torch.where(mask_B1HW > 0, torch.full_like(x_BCHW, BLANK), x_BCHW)


def inpainting(mask_B1HW: Tensor, masked_BChw: Tensor) -> Tensor:
    """(B, 1 + C, h, w): mask and masked latent, in the order of Stable Diffusion's inpainting models.

    A latent pixel that touches the part to paint is painted. `masked_BChw` is normalised.
    """
    factor = mask_B1HW.shape[-1] // masked_BChw.shape[-1]
    return torch.cat([F.max_pool2d(mask_B1HW, factor).to(masked_BChw), masked_BChw], dim=1)


def small(x_BCHW: Tensor, factor: int) -> Tensor:
    """The pictures made smaller, each pixel the mean of factor x factor; H and W must divide by the factor."""
    return F.avg_pool2d(x_BCHW, factor)


def super_resolution(small_BCHW: Tensor, latent_hw: Sequence[int]) -> Tensor:
    """(B, 3, h, w): the small picture at the latent's resolution (Saharia et al. 2021, section 2.3, in pixel space)."""
    if tuple(small_BCHW.shape[-2:]) == tuple(latent_hw):
        return small_BCHW
    # In float32: on a CPU there is no antialiasing in half precision.
    large = F.interpolate(small_BCHW.float(), list(latent_hw), mode="bilinear", align_corners=False, antialias=True)
    return large.to(small_BCHW.dtype)


def of_pictures(
    config: BesideConfig,
    x_BCHW: Tensor,
    keys_B: Tensor,
    encode: Callable[[Tensor], Tensor],
    latent_hw: Sequence[int],
) -> Tensor | None:
    """(B, channels, h, w): what a denoiser sees beside the latents of pictures in [-1, 1]; None where it sees nothing more.

    Args:
        keys_B: of the samples' masks.
        encode: pictures to normalised latents.
    """
    if config.kind == "inpainting":
        mask = masks(keys_B, *x_BCHW.shape[-2:]).to(x_BCHW)
        return inpainting(mask, encode(without(x_BCHW, mask)))
    if config.kind == "super_resolution":
        return super_resolution(small(x_BCHW, config.factor), latent_hw)
    return None
