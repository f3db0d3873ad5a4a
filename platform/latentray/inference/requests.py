"""What one picture, clip or plan of actions is drawn from, and what comes back."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from latentray.config.bounds import CLAMP, IDENTITY, check_guidance
from latentray.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """One picture or clip to draw. `height` and `width` are in pixels, multiples of the model's downsampling.

    Raises ConfigError, naming the field, for guidance out of bounds, a strength without a picture, a mask of another size,
    a clip that is to start from a picture.
    """

    prompt: str
    negative_prompt: str | None = None
    """What guidance leads away from; None where nobody says: the empty caption, or zeros for a model that learnt so."""
    label: int | None = None
    """The class to draw, for models of classes, or with a classifier; None is the null class."""
    like_HWC: np.ndarray | None = None
    """A picture to draw variations of, uint8 RGB of any size, for models with a vision encoder."""
    steps: int
    guidance_scale: float
    seed: int
    sampler: str
    height: int
    width: int
    frames: int = 0
    """Of a clip; 0 for a picture."""
    eta: float = 0.0
    """Of ddim."""
    order: int = 2
    """Of unipc."""
    spacing: str | None = None
    """Which noise levels are visited; None for the schedule's default."""
    classifier_scale: float = 0.0
    """How strongly a classifier of noisy latents, where the model has one, draws to the label (Dhariwal & Nichol 2021)."""
    guidance_rescale: float = 0.0
    """Share of the guided output's standard deviation that is brought back to the conditional one's."""
    guidance_interval: tuple[float, float] = (0.0, math.inf)
    """Noise levels sigma/alpha, (low, high], in which guidance acts."""
    bound: str = IDENTITY
    """What is done to each estimate of x_0: identity, clamp or threshold."""
    quantile: float = 0.995
    """Of the dynamic threshold."""
    resolution_shift: bool = False
    """Rectified flow: shift the noise levels for a size other than the trained one."""
    picture_HWC: np.ndarray | None = None
    """Picture-to-picture and inpainting: where to start from, uint8 RGB (height, width, 3)."""
    strength: float = 1.0
    """Share of the steps that is run; at 1 nothing of the picture is kept but what the mask keeps."""
    small_HWC: np.ndarray | None = None
    """Super-resolution: the picture to make larger, uint8 RGB, smaller than height and width by the model's factor."""
    mask_HW: np.ndarray | None = None
    """Inpainting: True or nonzero where to paint, (height, width); the rest of the picture stays as it is."""

    def __post_init__(self) -> None:
        check_guidance(self.guidance_scale, rescale_share=self.guidance_rescale, interval=self.guidance_interval)
        if not math.isfinite(self.classifier_scale) or self.classifier_scale < 0:
            raise ConfigError(
                f"classifier_scale is {self.classifier_scale}.",
                where="classifier_scale",
                mend="Choose 0 or more; 0 is none.",
            )
        wanted = (self.height, self.width)
        if self.frames < 0:
            raise ConfigError(f"A clip of {self.frames} frames.", where="frames", mend="Choose 1 or more.")
        if self.frames and self.picture_HWC is not None:
            raise ConfigError("A clip is drawn from text alone.", where="picture", mend="Leave it out.")
        if self.picture_HWC is None and (self.mask_HW is not None or self.strength != 1.0):
            raise ConfigError(
                "A mask or a strength asks for a picture to start from.", where="picture", mend="Give one."
            )
        if self.picture_HWC is not None and self.picture_HWC.shape != (*wanted, 3):
            raise ConfigError(
                f"The picture is {self.picture_HWC.shape}, not (height, width, 3) = {(*wanted, 3)}.",
                where="picture",
                mend="Resize it.",
            )
        if self.mask_HW is not None and self.mask_HW.shape != wanted:
            raise ConfigError(
                f"The mask is {self.mask_HW.shape}, not (height, width) = {wanted}.", where="mask", mend="Resize it."
            )


def label_of(wanted: str | int, classes: int | None, names: Sequence[str] = ()) -> int:
    """The number of a class by its number or its name. Raises ConfigError, naming `label`, where the model has none such.

    Args:
        classes: how many the model knows; None where it knows none.
        names: theirs, in their order, where they have names.
    """
    if classes is None:
        raise ConfigError("The model does not draw classes.", where="label", mend="Leave the label out.")
    if wanted in names:
        return list(names).index(str(wanted))
    if isinstance(wanted, int) or wanted.isdecimal():
        if 0 <= int(wanted) < classes:
            return int(wanted)
        raise ConfigError(
            f"There is no class {int(wanted)}.", where="label", mend=f"Give a number from 0 to {classes - 1}."
        )
    near = difflib.get_close_matches(wanted, names, n=3)
    known = f"Did you mean {', '.join(near)}?" if near else f"Give a number from 0 to {classes - 1}."
    raise ConfigError(f"There is no class {wanted[:80]!r}.", where="label", mend=known)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledPicture:
    """A drawn picture, uint8 RGB (H,W,3), or clip, (T,H,W,3), and what the user should know of how it came about."""

    pixels_HWC: np.ndarray
    truncated: bool
    """The prompt was longer than the tokenizer takes."""
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionRequest:
    """What one robot sees, and how its next actions are drawn."""

    observations: Mapping[str, np.ndarray]
    """Name -> (To, D), the latest last, in the units of the data the policy learnt from."""
    seed: int
    sampler: str
    steps: int
    eta: float = 0.0
    """Of ddim."""
    order: int = 2
    """Of unipc."""
    spacing: str | None = None
    """Which noise levels are visited; None for the schedule's default."""
    bound: str = CLAMP
    """What is done to each estimate of the actions: identity, clamp to the training data's range, or threshold."""
