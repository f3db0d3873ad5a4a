"""Training transforms: pure functions of a picture or its captions and of draws, none of which they make themselves.

Sizes are (height, width) and positions (y, x), in pixels. Draws are numbers in [0, 1), and keys of 64 bits, from `draws_of`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from latentray.errors import ConfigError
from latentray.randomness import Purpose, keys_of, mix, uniform
from latentray.records import SampleId


def _centre(slack: int, u: float) -> int:
    return slack // 2


def _random(slack: int, u: float) -> int:
    return min(int(u * (slack + 1)), slack)


CROPS: dict[str, Callable[[int, float], int]] = {"centre": _centre, "random": _random}
"""Name -> first row (or column) of the crop, of the `slack` + 1 that are possible, for a draw in [0, 1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn for one sample in one epoch."""

    crop: tuple[float, float]
    """For y and x."""
    flip: float
    caption: float
    tags: int
    """Key of a permutation."""


def draws_of(seed: int, ids: Sequence[SampleId]) -> list[Draws]:
    """The draws of each sample: they belong to the sample and its epoch, not to its batch."""
    crop, flip, caption = (
        uniform(keys_of(seed, purpose, ids), shape).tolist()
        for purpose, shape in ((Purpose.CROP, (2,)), (Purpose.FLIP, ()), (Purpose.CAPTION, ()))
    )
    tags = keys_of(seed, Purpose.TAGS, ids).tolist()
    return [
        Draws(crop=(y, x), flip=f, caption=c, tags=t) for (y, x), f, c, t in zip(crop, flip, caption, tags, strict=True)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizeConditioning:
    """What SDXL tells its network of a training picture's past (Podell et al. 2023, section 2.2)."""

    original_size: tuple[int, int]
    """(height, width) of the upright picture before anything was resized."""
    crop_top_left: tuple[int, int]
    """(y, x) of the crop in the resized picture, and in the mirrored one where it is mirrored; (0, 0) asks for the whole."""
    target_size: tuple[int, int]
    """(height, width) of the crop."""

    def numbers(self) -> tuple[int, ...]:
        """The six in the network's order: original size, crop, target size."""
        return (*self.original_size, *self.crop_top_left, *self.target_size)


def covering_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture of `size` once it is resized to just cover (height, width), its aspect ratio kept."""
    scale = max(height / size[0], width / size[1])
    return max(height, round(size[0] * scale)), max(width, round(size[1] * scale))


def resized_crop(
    pixels_HWC: np.ndarray,
    height: int,
    width: int,
    *,
    crop: str = "centre",
    u: tuple[float, float] = (0.0, 0.0),
    original_size: tuple[int, int] | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize to cover (height, width) and cut that out: uint8 (height, width, 3), and the (y, x) of the crop.

    Lanczos, antialiased; only the crop is computed. A picture that has the covering size already keeps its pixels.

    Args:
        crop: one of CROPS.
        u: draws for y and x.
        original_size: of the whole picture, where `pixels_HWC` was decoded at a scale: the crop is then the same at any scale.
    """
    have = pixels_HWC.shape[:2]
    resized = covering_size(original_size or have, height, width)
    y, x = (CROPS[crop](all_ - part, draw) for all_, part, draw in zip(resized, (height, width), u, strict=True))
    if have == resized:
        return pixels_HWC[y : y + height, x : x + width], (y, x)
    down, right = have[0] / resized[0], have[1] / resized[1]
    box = (x * right, y * down, min((x + width) * right, have[1]), min((y + height) * down, have[0]))
    image = Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(image), (y, x)


def mirrored(
    pixels_HWC: np.ndarray, crop_top_left: tuple[int, int], resized_width: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """A crop mirrored left to right, and its (y, x) in the mirrored picture, whose whole width is `resized_width`.

    That is SDXL's convention: the network is told which part it sees of the picture as it sees it, so mirroring comes
    before cropping, and a crop of the right edge counts as one of the left.
    """
    y, x = crop_top_left
    return pixels_HWC[:, ::-1], (y, resized_width - pixels_HWC.shape[1] - x)


def caption(texts: Sequence[str], u: float) -> str:
    """One of several captions, each as likely as the others for a draw in [0, 1)."""
    return texts[min(int(u * len(texts)), len(texts) - 1)]


def shuffle_tags(text: str, *, key: int, keep_first: int = 0, separator: str = ",") -> str:
    """Tags in an order that `key` chooses, all but the first `keep_first`; empty tags are dropped.

    So that the network does not learn that some place in the list matters (NovelAI 2022).
    """
    tags = [tag for tag in map(str.strip, text.split(separator)) if tag]
    kept, rest = tags[:keep_first], tags[keep_first:]
    if len(rest) < 2:
        return text
    order = sorted(range(len(rest)), key=lambda i: mix(key, i))
    return f"{separator} ".join([*kept, *(rest[i] for i in order)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """What is varied from epoch to epoch."""

    crop: str = "centre"
    """Where a picture is cut: centre or random."""
    flip: bool = False
    """Mirror half of the pictures left to right."""
    shuffle_tags: bool = False
    """Permute the comma-separated tags of each caption."""
    keep_tags: int = 0
    """How many tags at the head of a caption keep their place."""

    def __post_init__(self) -> None:
        if self.crop not in CROPS:
            raise ConfigError(
                f"There is no crop {self.crop!r}.", where="augment.crop", mend=f"Known: {', '.join(CROPS)}."
            )
        if self.keep_tags < 0:
            raise ConfigError(
                f"{self.keep_tags} tags cannot be kept.", where="augment.keep_tags", mend="Give 0 or more."
            )

    def flips(self, draws: Draws) -> bool:
        """True where this sample is mirrored."""
        return self.flip and draws.flip < 0.5

    def picture(
        self, pixels_HWC: np.ndarray, height: int, width: int, *, draws: Draws, original_size: tuple[int, int]
    ) -> tuple[np.ndarray, SizeConditioning]:
        """uint8 (height, width, 3) of a picture decoded at any scale that covers it, and its conditioning."""
        pixels_HWC, top_left = resized_crop(
            pixels_HWC, height, width, crop=self.crop, u=draws.crop, original_size=original_size
        )
        if self.flips(draws):
            pixels_HWC, top_left = mirrored(pixels_HWC, top_left, covering_size(original_size, height, width)[1])
        told = SizeConditioning(original_size=original_size, crop_top_left=top_left, target_size=(height, width))
        return pixels_HWC, told

    def text(self, texts: Sequence[str], draws: Draws) -> str:
        """The caption this sample takes."""
        chosen = caption(texts, draws.caption)
        if not self.shuffle_tags:
            return chosen
        return shuffle_tags(chosen, key=draws.tags, keep_first=self.keep_tags)
