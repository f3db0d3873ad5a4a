"""Group `denoiser`: the architecture of stage 2."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from latentray.errors import ConfigError

FAMILIES = ("unet", "mmdit", "video", "policy", "classifier")
POOLINGS = ("attention", "mean")
COMBINATIONS = ("one", "sdxl", "sd3", "sequence")


@dataclasses.dataclass(kw_only=True)
class DenoiserConfig:
    """A U-Net in Stable Diffusion's layout (SD 1, SD 2, SDXL), one with layers over time, an MMDiT (SD 3, SD 3.5) or a policy; or
    the classifier of noisy latents that guides one of them."""

    family: str = "unet"
    """unet, mmdit, video (a U-Net with layers over time) or policy; with stage=classifier classifier, a U-Net's downward half."""
    in_channels: int = 4
    """Channels of the latent that goes in."""
    out_channels: int = 4
    """Channels of the prediction."""
    context_width: int | None = 768
    """Width of the text tokens; null for an unconditional U-Net, whose cross-attention is self-attention then."""
    combine: str = "one"
    """What becomes of embeddings by several encoders: `one` reads the first alone; `sdxl` sets two side by side and reads the
    second's pooled text; `sd3` sets two CLIPs side by side and T5's tokens behind them; `sequence` sets all tokens one behind
    the other."""
    pooled_width: int | None = None
    """Width of the pooled text embedding that joins the time embedding (SDXL, SD 3); null for none."""
    checkpoint_activations: bool = False
    """Keep only what goes into each block for the backward pass and compute the rest again: less memory, a third more time."""
    heads: int | None = 8
    """Attention heads; in a U-Net at every level (SD 1), or null to set head_dim or level_heads instead."""
    head_dim: int | None = None
    """Width of one head (SD 2, SDXL, SD 3: 64); in a U-Net null to set heads or level_heads instead."""

    level_heads: list[int] | None = None
    """U-Net: attention heads of each level; null to set heads or head_dim instead."""
    channels: list[int] = dataclasses.field(default_factory=lambda: [320, 640, 1280, 1280])
    """U-Net: width of each level, from the finest."""
    blocks: int = 2
    """U-Net: residual blocks per level on the way down; one more on the way up."""
    depth: list[int] = dataclasses.field(default_factory=lambda: [1, 1, 1, 0])
    """U-Net: transformer blocks behind each residual block of a level; 0 for none."""
    middle_depth: int = 1
    """U-Net: transformer blocks in the middle."""
    linear_projection: bool = False
    """U-Net: project into the transformers by Linear (SD 2, SDXL) instead of 1x1 convolution (SD 1)."""
    groups: int = 32
    """U-Net: groups of every GroupNorm."""
    size_numbers: int = 0
    """U-Net: numbers that say a picture's size beside the pooled text: 6 (SDXL: original size, crop and target size, height
    before width), 5 (its refiner: original size, crop and aesthetic score) or 0."""
    size_width: int = 256
    """U-Net: width of the Fourier features of each of these numbers."""
    classes: int | None = None
    """U-Net: class labels 0 ... classes-1 beside the null class, whose number is `classes`; null for none. Classifier: those it
    tells apart."""

    context_layers: int = 0
    """U-Net: blocks of a text encoder that is trained with it (the first LDM: 32), over what an encoder of kind tokens gives;
    0 for none."""
    context_heads: int = 8
    """U-Net: its attention heads, 64 wide each; it is context_width wide."""
    context_tokens: int = 77
    """U-Net: the most tokens that it reads."""
    context_vocabulary: int | None = None
    """U-Net: how many different tokens it knows, at least the tokenizer's."""

    temporal_convolution: bool = True
    """Video: a convolution over time behind each residual block of the U-Net."""
    temporal_attention: bool = True
    """Video: attention over time behind each spatial transformer."""
    temporal_heads: int | None = None
    """Video: heads of the attention over time; null for those of the spatial transformer before it."""
    train_only_temporal: bool = False
    """Video: keep the image U-Net's own weights as they are; wants denoiser_from."""

    layers: int = 24
    """MMDiT: joint transformer blocks."""
    patch: int = 2
    """MMDiT: latent pixels along each side of a picture token."""
    max_grid: int = 192
    """MMDiT: picture tokens along each side of the table of position embeddings; smaller pictures take its middle."""
    base_grid: int = 64
    """MMDiT: span of the coordinates in that table."""
    qk_norm: bool = False
    """MMDiT: normalise queries and keys of each head by their root mean square (SD 3.5)."""
    dual_attention: list[int] = dataclasses.field(default_factory=list)
    """MMDiT: blocks with a second self-attention over the picture alone (SD 3.5 medium: the first 13)."""

    action_steps: int = 16
    """Policy: actions that are predicted together."""
    observation_steps: int = 2
    """Policy: latest observations that it is told."""
    observation_width: int | None = None
    """Policy: numbers of one observation."""
    kernel: int = 5
    """Policy: steps that a convolution spans."""

    pool: str = "attention"
    """Classifier: attention or mean, over all pixels."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"There is no family {self.family!r}.", where="denoiser.family", mend=f"Known: {', '.join(FAMILIES)}."
            )
        if self.combine not in COMBINATIONS:
            raise ConfigError(
                f"There is no combination {self.combine!r}.",
                where="denoiser.combine",
                mend=f"Known: {', '.join(COMBINATIONS)}.",
            )
        for field in ("in_channels", "out_channels", "context_width", "pooled_width", "heads", "head_dim"):
            self._require_at_least(field, 1)
        checks = {
            "unet": self._check_unet,
            "mmdit": self._check_mmdit,
            "video": self._check_video,
            "policy": self._check_policy,
            "classifier": self._check_classifier,
        }
        checks[self.family]()

    def _check_unet(self) -> None:
        for field, least in (
            ("blocks", 1), ("middle_depth", 0), ("groups", 1), ("classes", 1), ("size_numbers", 0), ("size_width", 2),
            ("channels", 1), ("level_heads", 1), ("depth", 0),
        ):  # fmt: skip
            self._require_at_least(field, least)
        if not self.channels:
            raise ConfigError("A U-Net needs a level.", where="denoiser.channels", mend="Give [64,128], say.")
        for field in ("depth", "level_heads"):
            given = getattr(self, field)
            if given is not None and len(given) != len(self.channels):
                raise ConfigError(
                    f"{field} has {len(given)} entries for {len(self.channels)} levels.",
                    where=f"denoiser.{field}",
                    mend="Give one number per entry of denoiser.channels.",
                )
        of_heads = [field for field in ("head_dim", "level_heads", "heads") if getattr(self, field) is not None]
        if len(of_heads) != 1:
            told = " and ".join(f"{field}={getattr(self, field)}" for field in of_heads) or "none of them"
            raise ConfigError(
                f"One of heads, head_dim and level_heads is wanted, not {told}.",
                where=f"denoiser.{(of_heads or ['heads'])[0]}",
                mend="Set one of them, and the others to null.",
            )
        for field, number in (("channels", self.channels[0]), ("size_width", self.size_width)):
            if number % 2:
                raise ConfigError(
                    f"{number} is odd: sines and cosines share it evenly.",
                    where=f"denoiser.{field}",
                    mend="Choose an even number.",
                )
        for level, width in enumerate(self.channels):
            if width % self.groups:
                raise ConfigError(
                    f"{width} channels do not divide into {self.groups} groups.",
                    where="denoiser.channels",
                    mend="Choose multiples of denoiser.groups.",
                )
            number = self.level_heads[level] if self.level_heads else self.heads or self.head_dim or 1
            if width % number:
                raise ConfigError(
                    f"{width} channels do not divide into {f'heads of {number}' if self.head_dim else f'{number} heads'}.",
                    where=f"denoiser.{of_heads[0]}",
                    mend="Choose a divisor of every level's channels.",
                )

        self._check_context()

    def _check_context(self) -> None:
        for field, least in (
            ("context_layers", 0),
            ("context_heads", 1),
            ("context_tokens", 1),
            ("context_vocabulary", 1),
        ):
            self._require_at_least(field, least)
        if not self.context_layers:
            return
        for refused, field, what, mend in (
            (self.context_width is None, "context_width", "A learned text encoder has a width.", "Set it to 640, say."),
            (self.context_vocabulary is None, "context_vocabulary", "A learned text encoder knows so many tokens.",
             "Set it to the tokenizer's number."),
            (self.combine != "one", "combine", "A learned text encoder reads one tokenizer's tokens.", "Set it to one."),
            (self.pooled_width is not None, "pooled_width", "A learned text encoder gives no pooled text.",
             "Set it to null."),
        ):  # fmt: skip
            if refused:
                raise ConfigError(what, where=f"denoiser.{field}", mend=mend)

    def _check_video(self) -> None:
        self._check_unet()
        self._require_at_least("temporal_heads", 1)
        transformed = any(self.depth) or self.middle_depth
        if not self.temporal_convolution and not (self.temporal_attention and transformed):
            raise ConfigError(
                "No layer of this video network sees more than one frame.",
                where="denoiser.temporal_convolution",
                mend="Set it to true; temporal_attention needs spatial transformers to stand behind (denoiser.depth).",
            )
        for width in self.channels if self.temporal_attention else ():
            if width % (self.temporal_heads or 1) or width % 2:
                raise ConfigError(
                    f"{width} channels do not divide into {self.temporal_heads or 2}.",
                    where="denoiser.temporal_heads" if width % 2 == 0 else "denoiser.channels",
                    mend="Choose a divisor of every level's channels, which are even.",
                )

    def _check_mmdit(self) -> None:
        for field in ("layers", "patch", "max_grid", "base_grid"):
            self._require_at_least(field, 1)
        if self.heads is None or self.head_dim is None or self.level_heads is not None:
            raise ConfigError(
                "An mmdit is heads x head_dim wide.",
                where="denoiser.heads",
                mend="Set both of them, and level_heads to null.",
            )
        if self.context_width is None:
            raise ConfigError(
                "An mmdit reads text tokens.",
                where="denoiser.context_width",
                mend="Set it to the text encoder's width.",
            )
        if self.size_numbers or self.classes is not None:
            raise ConfigError(
                "An mmdit takes neither size numbers nor class labels.",
                where="denoiser.size_numbers" if self.size_numbers else "denoiser.classes",
                mend="Leave them out, or use family=unet.",
            )
        if self.width % 4:
            raise ConfigError(
                f"{self.heads} heads of {self.head_dim} are {self.width} wide: sines and cosines of both coordinates "
                "share it evenly.",
                where="denoiser.head_dim",
                mend="Make heads x head_dim a multiple of 4.",
            )
        if any(not 0 <= block < self.layers for block in self.dual_attention):
            raise ConfigError(
                f"dual_attention names blocks outside 0 ... {self.layers - 1}.",
                where="denoiser.dual_attention",
                mend="Name blocks there are.",
            )

    def _check_policy(self) -> None:
        for field in (
            "blocks",
            "groups",
            "channels",
            "kernel",
            "action_steps",
            "observation_steps",
            "observation_width",
        ):
            self._require_at_least(field, 1)
        for refused, field, what, mend in (
            (self.in_channels != self.out_channels, "out_channels", "A policy denoises the actions that go in.",
             "Set it to denoiser.in_channels."),
            (self.observation_width is None, "observation_width", "A policy is told what is seen.",
             "Set it to the numbers of one observation."),
            (not self.channels or self.channels[0] % 2, "channels", f"{self.channels} are no levels of a policy.",
             "Give [256,512,1024], say, an even number first."),
            (any(width % self.groups for width in self.channels), "channels",
             f"Not all of {self.channels} channels divide into {self.groups} groups.",
             "Choose multiples of denoiser.groups."),
            (not self.kernel % 2, "kernel", f"A kernel of {self.kernel} has no middle.", "Choose an odd number."),
            (self.reads_text, "context_width", "A policy reads observations, not text.",
             "Set context_width and pooled_width to null."),
            (self.size_numbers or self.classes is not None, "size_numbers" if self.size_numbers else "classes",
             "A policy takes neither size numbers nor class labels.", "Leave them out, or use family=unet."),
        ):  # fmt: skip
            if refused:
                raise ConfigError(what, where=f"denoiser.{field}", mend=mend)
        halvings = 2 ** (len(self.channels) - 1)
        if self.action_steps % halvings:
            raise ConfigError(
                f"{self.action_steps} actions cannot be halved {len(self.channels) - 1} times.",
                where="denoiser.action_steps",
                mend=f"Choose a multiple of {halvings}.",
            )

    def _check_classifier(self) -> None:
        self._check_unet()
        for refused, field, what, mend in (
            (self.pool not in POOLINGS, "pool", f"There is no pooling {self.pool!r}.", f"Known: {', '.join(POOLINGS)}."),
            (self.classes is None, "classes", "A classifier tells classes apart.", "Set it to their number."),
            (self.reads_text or self.context_layers > 0, "context_width", "A classifier reads latents alone.",
             "Set context_width and pooled_width to null, and context_layers to 0."),
            (self.size_numbers > 0, "size_numbers", "A classifier takes no size numbers.", "Set it to 0."),
            (self.pool == "attention" and self.channels[-1] % 4 > 0, "channels",
             f"{self.channels[-1]} channels do not tell row and column by sines and cosines.",
             "Make the last a multiple of 4, or set denoiser.pool=mean."),
        ):  # fmt: skip
            if refused:
                raise ConfigError(what, where=f"denoiser.{field}", mend=mend)

    def _require_at_least(self, field: str, least: int) -> None:
        value = getattr(self, field)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        if any(number < least for number in numbers):
            raise ConfigError(f"{field} is {value}.", where=f"denoiser.{field}", mend=f"Choose {least} or more.")

    @property
    def width(self) -> int:
        """Of an mmdit's tokens."""
        return (self.heads or 0) * (self.head_dim or 0)

    @property
    def reads_text(self) -> bool:
        return self.context_width is not None or self.pooled_width is not None

    @property
    def reads(self) -> tuple[str, ...]:
        """The conditions beside time and text tokens that the network must be given: of pooled, size, labels, observations."""
        wanted = {
            "pooled": self.pooled_width is not None,
            "size": self.size_numbers > 0,
            "labels": self.classes is not None and self.family != "classifier",
            "observations": self.observation_width is not None,
        }
        return tuple(name for name, is_read in wanted.items() if is_read)

    def require_shapes(self, shapes: Iterable[tuple[int, int]], factor: int) -> None:
        """Raise ConfigError unless it can halve, or cut into patches, the latents of pictures of these heights and widths.

        Args:
            factor: the autoencoder's downsampling.
        """
        key, unit = "denoiser.channels", 2 ** (len(self.channels) - 1)
        if self.family == "mmdit":
            key, unit = "denoiser.patch", self.patch
        for height, width in shapes:
            rows, columns = height // factor, width // factor
            if rows % unit or columns % unit:
                raise ConfigError(
                    f"Latents of {columns}x{rows}, of pictures of {width}x{height}, do not divide by the denoiser's {unit}.",
                    where=key,
                    mend=f"Make heights and widths of pictures multiples of {factor * unit}, or lower {key}.",
                )

    def heads_at(self, level: int) -> int:
        """Attention heads of a U-Net's level; its middle has those of the last."""
        if self.level_heads is not None:
            return self.level_heads[level]
        return self.heads if self.heads is not None else self.channels[level] // (self.head_dim or 1)
