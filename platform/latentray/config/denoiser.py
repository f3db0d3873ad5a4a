"""Group `denoiser`: the architecture of stage 2."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

FAMILIES = ("unet", "mmdit")


@dataclasses.dataclass(kw_only=True)
class DenoiserConfig:
    """A U-Net in Stable Diffusion's layout (SD 1, SD 2, SDXL), or an MMDiT (SD 3, SD 3.5)."""

    family: str = "unet"
    """unet or mmdit."""
    in_channels: int = 4
    """Channels of the latent that goes in."""
    out_channels: int = 4
    """Channels of the prediction."""
    context_width: int | None = 768
    """Width of the text tokens; null for an unconditional U-Net, whose cross-attention is self-attention then."""
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
    """U-Net: class labels 0 ... classes-1 beside the null class, whose number is `classes`; null for none."""

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

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"There is no family {self.family!r}.", where="denoiser.family", mend=f"Known: {', '.join(FAMILIES)}."
            )
        for field in ("in_channels", "out_channels", "context_width", "pooled_width", "heads", "head_dim"):
            self._require_at_least(field, 1)
        if self.family == "unet":
            self._check_unet()
        else:
            self._check_mmdit()

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
        if sum(one is not None for one in (self.heads, self.head_dim, self.level_heads)) != 1:
            raise ConfigError(
                "One of heads, head_dim and level_heads is wanted.",
                where="denoiser.heads",
                mend="Set the others to null.",
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
            if width % (self.level_heads[level] if self.level_heads else self.heads or self.head_dim or 1):
                raise ConfigError(
                    f"{width} channels do not divide into the heads.",
                    where="denoiser.level_heads" if self.level_heads else "denoiser.heads",
                    mend="Change heads, head_dim or level_heads.",
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
    def reads(self) -> tuple[str, ...]:
        """The conditions beside time and text tokens that the network must be given: of pooled, size and labels."""
        wanted = {
            "pooled": self.pooled_width is not None,
            "size": self.size_numbers > 0,
            "labels": self.classes is not None,
        }
        return tuple(name for name, is_read in wanted.items() if is_read)

    def heads_at(self, level: int) -> int:
        """Attention heads of a U-Net's level; its middle has those of the last."""
        if self.level_heads is not None:
            return self.level_heads[level]
        return self.heads if self.heads is not None else self.channels[level] // (self.head_dim or 1)
