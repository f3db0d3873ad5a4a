"""Settings of `python -m jobs.sample`."""

from __future__ import annotations

import dataclasses
import math
import re

from latentray.config.bounds import check_guidance
from latentray.errors import ConfigError

OUTPUTS = (".png", ".webp", ".mp4")
COMPARISONS = ("none", "sampler", "guidance", "steps")


@dataclasses.dataclass(kw_only=True)
class Sample:
    """Draw pictures or clips from a release or a model folder, in the shell."""

    release: str | None = None
    """A release's or a model's folder, path or URI; with `registry`, an alias or a release id."""
    registry: str | None = None
    """The registry `release` is looked up in."""
    prompt: str | None = None
    """What to draw."""
    prompts: str | None = None
    """Or a text file of prompts, one a line."""
    episodes: int = 0
    """Policies, which take no prompt: drive one through so many scenes of the built-in environment, and draw its ways."""
    like: str | None = None
    """Models with a vision encoder: a picture to draw variations of; a prompt may be left out then."""
    label: str | None = None
    """Models of classes: the class to draw, its number or its name; a prompt may be left out then."""
    negative_prompt: str = ""
    n: int = 4
    """Pictures of each prompt; their seeds are seed, seed + 1, ..."""
    seed: int = 0
    sampler: str | None = None
    """null takes the model's default, as for steps and guidance_scale."""
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    """0 to 1: against oversaturation at strong guidance."""
    guidance_low: float = 0.0
    """Guidance acts where sigma/alpha is above this ..."""
    guidance_high: float | None = None
    """... and up to this; null for no bound."""
    bound: str = "identity"
    """What is done to each estimate of the clean latent: identity, clamp or threshold."""
    quantile: float = 0.995
    """Of the dynamic threshold."""
    spacing: str | None = None
    """Noise levels visited: trailing, leading, linspace, karras, geometric, sd3, as the schedule has them; null: its default."""
    eta: float = 0.0
    """Of ddim: share of the ancestral noise."""
    order: int = 2
    """Of unipc."""
    size: str | None = None
    """Width x height in pixels, such as 96x64; null is the model's own."""
    frames: int | None = None
    """Of each clip, for models of clips; null is the model's own."""
    resolution_shift: bool = False
    """Rectified flow: shift the noise levels for a size other than the trained one."""
    picture: str | None = None
    """A picture to start from."""
    strength: float = 0.7
    """How much of it may change, with a picture and no mask."""
    small: str | None = None
    """Super-resolution models: the picture to make larger."""
    mask: str | None = None
    """A picture whose light part is painted anew; the rest stays as it is."""
    refiner: str | None = None
    """A second model that takes over at the noise level `refine_at`."""
    refine_at: float = 0.2
    compare: str = "none"
    """none; or a sheet over samplers, guidance scales or step counts."""
    compare_values: list[float] = dataclasses.field(default_factory=list)
    """The guidance scales or step counts of the sheet; empty for usual ones."""
    batch_size: int = 16
    out: str = "samples.png"
    """The file to write; it says how it was drawn. Pictures: a PNG. Clips: an animated sheet, .png, .webp, or .mp4 where
    PyAV has an encoder for it."""
    device: str = "auto"
    offload: bool = False
    """Less memory, more time: each part of the model is on the device for its turn alone, and pictures are decoded in strips."""

    def __post_init__(self) -> None:
        if not self.release:
            raise ConfigError("A release is needed.", where="release", mend="Add release=<folder, URI or alias>.")
        if self.episodes < 0:
            raise ConfigError(f"{self.episodes} episodes.", where="episodes", mend="Choose 1 or more.")
        if (self.label is not None or self.like is not None) and self.prompts is None:
            self.prompt = self.prompt or ""
        if (self.prompt is None) == (self.prompts is None) and not self.episodes:
            raise ConfigError(
                "Either a prompt or a file of prompts is needed.", where="prompt", mend="Add prompt='...'."
            )
        for key in ("n", "batch_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} is {getattr(self, key)}.", where=key, mend="Choose 1 or more.")
        if self.compare not in COMPARISONS:
            raise ConfigError(
                f"There is no comparison {self.compare!r}.", where="compare", mend=f"Known: {', '.join(COMPARISONS)}."
            )
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"{self.steps} steps are out of range.", where="steps", mend="Choose 1 or more.")
        check_guidance(
            1.0 if self.guidance_scale is None else self.guidance_scale,
            rescale_share=self.guidance_rescale,
            interval=self.interval,
        )
        if self.size is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.size):
            raise ConfigError(f"size is {self.size!r}.", where="size", mend="Write width x height, such as 96x64.")
        if self.refiner is not None and self.picture is not None:
            raise ConfigError(
                "A refiner ends what was begun from text, not an edit.",
                where="picture",
                mend="Leave out one of the two.",
            )
        if self.prompts is not None and self.compare != "none":
            raise ConfigError("A sheet compares one prompt.", where="prompts", mend="Give prompt='...' instead.")
        if self.mask is not None and self.picture is None:
            raise ConfigError("A mask belongs to a picture.", where="picture", mend="Add picture=<file>.")
        if self.compare_values and self.compare not in ("guidance", "steps"):
            raise ConfigError(
                "Values are compared only with compare=guidance or compare=steps.",
                where="compare_values",
                mend="Add the one that is meant.",
            )
        if self.compare == "steps" and any(v != int(v) for v in self.compare_values):
            raise ConfigError("Step counts are whole numbers.", where="compare_values", mend="Write them so.")
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"A clip of {self.frames} frames.", where="frames", mend="Choose 1 or more.")
        if not self.out.endswith(OUTPUTS):
            raise ConfigError(
                f"{self.out} is neither a picture nor a clip.", where="out", mend=f"End it in {', '.join(OUTPUTS)}."
            )

    @property
    def interval(self) -> tuple[float, float]:
        return self.guidance_low, math.inf if self.guidance_high is None else self.guidance_high
