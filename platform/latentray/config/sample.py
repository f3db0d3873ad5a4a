"""Settings of `python -m jobs.sample`."""

from __future__ import annotations

import dataclasses
import math
import re

from latentray.config.bounds import check_guidance
from latentray.config.text_encoder import require_precision
from latentray.errors import ConfigError

OUTPUTS = (".png", ".webp", ".mp4")
COMPARISONS = ("none", "sampler", "guidance", "steps", "classifier")


@dataclasses.dataclass(kw_only=True)
class Sample:
    """Draw pictures or clips from a release or a model folder, in the shell."""

    release: str | None = None
    """A release's or a model's folder, path or URI; or a pipeline's folder in diffusers' layout, or its hub id `owner/name`, with
    `@revision` behind it. With `registry`, an alias or a release id."""
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
    """Models of classes, or with a classifier: the class to draw, its number or its name; a prompt may be left out then."""
    classifier: str | None = None
    """What jobs.train stage=classifier made, on the latents and noise levels of the model: it draws to the label."""
    classifier_scale: float | None = None
    """How strongly (Dhariwal & Nichol 2021); null is 1 with a classifier, more draws what is typical of the class."""
    negative_prompt: str | None = None
    """What guidance leads away from; null for nothing: the empty caption, or zeros for a model that learnt so (SDXL's base)."""
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
    """A second model that takes over at the noise level `refine_at`; named as `release` is."""
    refine_at: float = 0.2
    compare: str = "none"
    """none; or a sheet over samplers (sampler), guidance scales (guidance), step counts (steps) or scales of the classifier
    (classifier)."""
    compare_values: list[float] = dataclasses.field(default_factory=list)
    """The scales or step counts of the sheet; empty for usual ones."""
    batch_size: int = 16
    out: str = "samples.png"
    """The file to write; it says how it was drawn. Pictures: a PNG. Clips: an animated sheet, .png, .webp, or .mp4 where
    PyAV has an encoder for it."""
    device: str = "auto"
    offload: bool = False
    """Less memory, more time: each part of the model is on the device for its turn alone, and pictures are decoded in strips."""
    text_precision: str | None = None
    """fp32 or bf16: what text encoders compute in; null is what the model learnt from."""
    compile: bool = False
    """The denoiser by torch.compile: the first step takes minutes, all others less; for many pictures."""

    def __post_init__(self) -> None:
        if self.text_precision is not None:
            require_precision(self.text_precision, where="text_precision")
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
        self._check_classifier()
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
        if self.compare_values and self.compare not in ("guidance", "steps", "classifier"):
            raise ConfigError(
                "Values are compared only with compare=guidance, steps or classifier.",
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

    def _check_classifier(self) -> None:
        scale = self.classifier_scale
        for refused, where, what, mend in (
            (scale is not None and (not math.isfinite(scale) or scale < 0), "classifier_scale", f"It is {scale}.",
             "Choose 0 or more; 0 is none."),
            (self.classifier is None and (scale is not None or self.compare == "classifier"), "classifier",
             "No classifier is named.", "Add classifier=<what stage=classifier made>."),
            (self.classifier is not None and self.label is None, "label", "A classifier draws to a class.",
             "Add label=<its number or name>."),
            (self.classifier is not None and self.refiner is not None, "refiner",
             "A classifier guides one model, not a refiner besides.", "Leave out one of the two."),
        ):  # fmt: skip
            if refused:
                raise ConfigError(what, where=where, mend=mend)

    @property
    def pull(self) -> float:
        """The scale of classifier guidance; 0 without a classifier."""
        if self.classifier is None:
            return 0.0
        return 1.0 if self.classifier_scale is None else self.classifier_scale

    @property
    def interval(self) -> tuple[float, float]:
        return self.guidance_low, math.inf if self.guidance_high is None else self.guidance_high
