"""Settings of `python -m jobs.precompute_latents`."""

from __future__ import annotations

import dataclasses

from latentray.config.feed import DamageConfig
from latentray.config.text_encoder import TextEncoderConfig, require_names, require_precision
from latentray.errors import ConfigError

DTYPES = ("float16", "bfloat16", "float32")
MOST_CROPS = 32


@dataclasses.dataclass(kw_only=True)
class LatentBucketsConfig:
    """Shapes of several aspect ratios and resolutions, instead of squares: little of a picture is cut."""

    sizes: list[int] = dataclasses.field(default_factory=list)
    """Resolutions, as sides of squares in pixels: a picture takes the greatest that it fills; none encodes squares."""
    step: int = 64
    """Heights and widths are multiples of it, and it of the autoencoder's downsampling."""
    max_aspect: float = 2.0
    """The longest side is at most so many times the shortest."""

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ConfigError("It must be at least 1.", where="buckets.step", mend="Raise buckets.step.")
        if not self.max_aspect >= 1:
            raise ConfigError(
                "An aspect ratio of long to short is at least 1.", where="buckets.max_aspect", mend="Set it to 2, say."
            )
        if any(size < 1 or size % self.step for size in self.sizes) or len(set(self.sizes)) < len(self.sizes):
            raise ConfigError(
                f"buckets.sizes takes different multiples of {self.step}.",
                where="buckets.sizes",
                mend="Change one of them, or buckets.step.",
            )


@dataclasses.dataclass(kw_only=True)
class ClipConfig:
    """Which frames of a clip are encoded; data sets of clips need it, others take none."""

    frames: int | None = None
    """Frames of each record, from the clip's first on; shorter clips are damaged."""
    fps: float | None = None
    """Frames per second; null is the clips' own, where all have the same."""

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ConfigError("It must be at least 1.", where="clip.frames", mend="Raise clip.frames.")
        if self.fps is not None and not 0.001 <= self.fps <= 1000:
            raise ConfigError("It lies outside 0.001 ... 1000.", where="clip.fps", mend="Set clip.fps=8, say.")


@dataclasses.dataclass(kw_only=True)
class PrecomputeLatents:
    """Encode a data set's pictures or clips and their captions once, for every epoch of stage 2."""

    text_encoder: TextEncoderConfig | None = None
    """What embeds the captions; `~text_encoder` leaves it out, and stores latents alone."""
    text_encoders: list[TextEncoderConfig] = dataclasses.field(default_factory=list)
    """Instead of that one, several, each under a name of its own; encoders=sdxl or encoders=sd3 names those of a family."""
    data: str | None = None
    """What build_shards wrote (train/ and validation/ below)."""
    autoencoder_from: str | None = None
    """The autoencoder's artifact, a path or URI; or a folder in diffusers' layout, of a pipeline or an AutoencoderKL alone, or a
    hub id of one: `owner/name`, with `@revision` behind it. What is made of these lies below `out`."""
    out: str | None = None
    """Where the latents go (train/ and validation/ below)."""
    reuse: str | None = None
    """Latents of the same encoders, of this data set before it grew or of another: pictures that they hold are copied."""
    sizes: list[int] = dataclasses.field(default_factory=list)
    """Pictures are resized and cut to these squares; none is what the autoencoder was trained on, several give <out>/<size>."""
    buckets: LatentBucketsConfig = dataclasses.field(default_factory=LatentBucketsConfig)
    """Instead of squares, each picture in the shape nearest to its own."""
    clip: ClipConfig = dataclasses.field(default_factory=ClipConfig)
    crops: int = 1
    """Cuts of each picture: the first its centre, further ones drawn along what is too long; of clips drawn in time too."""
    flip_variants: bool = False
    """Store each cut mirrored too."""
    batch_size: int = 64
    """So many pictures, or frames, of one shape are encoded together; the last batch of a shard and shape is padded to it."""
    precision: str = "fp32"
    """fp32 or bf16: what the autoencoder computes in. In bf16 a CPU with bf16 units takes a sixth of the time, and latents move
    by about a hundredth of their deviation."""
    latent_dtype: str = "float32"
    """float16, bfloat16 or float32: the type of stored mean and log-variance."""
    text_dtype: str = "float16"
    """float16, bfloat16 or float32: the type of stored embeddings."""
    max_pixels: int = 64_000_000
    """Pictures and frames with more pixels are damaged, and are not decoded."""
    damage: DamageConfig = dataclasses.field(default_factory=DamageConfig)
    """What becomes of pictures and clips that cannot be decoded; those left out are listed in rejected.jsonl."""
    actors: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    """Fewest and most encoder actors."""
    device: str = "auto"
    address: str | None = None
    """A running Ray cluster; null starts one on this machine."""
    estimate: bool = False
    """Encode a few batches, tell hours, bytes and cost of the whole, and write nothing."""
    epochs: float = 10.0
    """Estimate: how often stage 2 will see the data; tells whether storing latents is cheaper than encoding as it goes."""
    price_per_hour: float = 0.0
    """Estimate: of one encoder, with its share of the machine."""
    storage_price: float = 0.0
    """Estimate: of one terabyte, for as long as the latents are kept."""

    def __post_init__(self) -> None:
        for key in ("data", "autoencoder_from", "out"):
            if not getattr(self, key):
                raise ConfigError("This setting is needed.", where=key, mend=f"Add {key}=<path or URI>.")
        for key in ("batch_size", "max_pixels"):
            if getattr(self, key) < 1:
                raise ConfigError("It must be at least 1.", where=key, mend=f"Raise {key}.")
        if not 1 <= self.crops <= MOST_CROPS:
            raise ConfigError(f"It lies outside 1 ... {MOST_CROPS}.", where="crops", mend="Set crops=1, say.")
        if any(size < 1 for size in self.sizes) or len(set(self.sizes)) < len(self.sizes):
            raise ConfigError("sizes takes different numbers of pixels.", where="sizes", mend="Set sizes=[256], say.")
        if self.sizes and self.buckets.sizes:
            raise ConfigError(
                "Pictures become squares or take the shapes of buckets.", where="sizes, buckets.sizes", mend="Set one."
            )
        for key in ("latent_dtype", "text_dtype"):
            if getattr(self, key) not in DTYPES:
                raise ConfigError(f"{key} takes {', '.join(DTYPES)}.", where=key, mend="Correct it.")
        require_precision(self.precision, where="precision")
        if len(self.actors) != 2 or not 1 <= self.actors[0] <= self.actors[1]:
            raise ConfigError("actors takes [fewest, most].", where="actors", mend="Set actors=[1,2], say.")
        require_names(self.all_text_encoders, where="text_encoders")
        for key in ("price_per_hour", "storage_price"):
            if not getattr(self, key) >= 0:
                raise ConfigError("A price is not negative.", where=key, mend=f"Set {key} to 0 or more.")
        if not self.epochs > 0:
            raise ConfigError("It must be positive.", where="epochs", mend="Set epochs=10, say.")

    @property
    def all_text_encoders(self) -> list[TextEncoderConfig]:
        """In the order that a denoiser combines them in."""
        return self.text_encoders or ([self.text_encoder] if self.text_encoder is not None else [])
