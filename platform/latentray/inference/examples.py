"""What a model is asked for where nobody asks: requests that resemble its samples, for sheets and evaluation."""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image

from latentray import randomness
from latentray.conditioning import beside
from latentray.inference.requests import SamplingRequest
from latentray.inference.sampling import TextToImage
from latentray.randomness import Purpose
from latentray.reporting import pictures


def example(
    model: TextToImage,
    prompt: str,
    *,
    seed: int,
    label: int | None = None,
    original_HWC: np.ndarray | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> SamplingRequest:
    """A request of the model's own size and frames, with its defaults where nothing else is said.

    Args:
        label: a class, -1 or None for none in particular; models without classes do not look at it.
        original_HWC: a picture that the prompt is the caption of, uint8 of the model's size; a super-resolution model is given
            it made small, or, without one, a gray one; one with a vision encoder is shown it.
    """
    defaults, factor = model.defaults, model.makes_larger
    small = None
    if factor:
        base = np.full((model.size, model.size, 3), 127, np.uint8) if original_HWC is None else original_HWC
        small = smaller(model, base, factor)
    return SamplingRequest(
        prompt=prompt,
        label=None if model.classes is None or label is None or label < 0 else label,
        steps=defaults.steps if steps is None else steps,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
        seed=seed,
        sampler=sampler or defaults.sampler,
        height=model.size,
        width=model.size,
        frames=model.frames,
        small_HWC=small,
        like_HWC=original_HWC if model.takes_like else None,
    )


def repair(
    model: TextToImage, prompt: str, original_HWC: np.ndarray, *, seed: int, label: int | None = None
) -> SamplingRequest:
    """A request to bring back a picture of which the model is given the small form, or all but what a mask covers.

    The mask is one of those it was trained on; arguments as `example` has them.
    """
    asked = example(model, prompt, seed=seed, label=label, original_HWC=original_HWC)
    if not model.takes_mask:
        return asked
    keys = randomness.keys_from_seeds([seed], Purpose.MASK)
    mask = beside.masks(keys, model.size, model.size)[0, 0].numpy() > 0
    return dataclasses.replace(asked, picture_HWC=original_HWC, mask_HW=mask)


def given(asked: SamplingRequest) -> dict[str, np.ndarray]:
    """The pictures that a request starts from, by what a sheet calls them, uint8 and no larger than what is drawn."""
    found = {}
    if asked.picture_HWC is not None:
        mask = asked.mask_HW
        found["given"] = asked.picture_HWC if mask is None else pictures.veiled(asked.picture_HWC, mask)
    if asked.small_HWC is not None:
        height, width = asked.small_HWC.shape[:2]
        found[f"given: {width}x{height}"] = pictures.enlarged(asked.small_HWC, max(asked.height // height, 1))
    if asked.like_HWC is not None:
        like = Image.fromarray(asked.like_HWC)
        like.thumbnail((asked.width, asked.height))
        found["like"] = np.asarray(like)
    return found


def smaller(model: TextToImage, pixels_HWC: np.ndarray, factor: int) -> np.ndarray:
    """A picture as a super-resolution model was trained to see it, uint8."""
    x = beside.small(model.pixels(pixels_HWC).float(), factor)
    return ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
