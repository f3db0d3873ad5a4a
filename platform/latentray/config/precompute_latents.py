"""Settings of `python -m jobs.precompute_latents`."""

from __future__ import annotations

import dataclasses

from latentray.config.text_encoder import TextEncoderConfig
from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class PrecomputeLatents:
    """Encode a data set's pictures and captions once, for every epoch of stage 2."""

    text_encoder: TextEncoderConfig = dataclasses.field(default_factory=TextEncoderConfig)
    data: str | None = None
    """What build_shards wrote (train/ and validation/ below)."""
    autoencoder_from: str | None = None
    """The autoencoder's artifact, a path or URI."""
    out: str | None = None
    """Where the latents go (train/ and validation/ below)."""
    size: int | None = None
    """Pictures are resized and cut to this square; null is what the autoencoder was trained on."""
    flip_variants: bool = False
    """Store a mirrored variant of each picture too."""
    batch_size: int = 64
    """The one shape pictures are encoded in; the last batch of a shard is padded to it."""
    text_dtype: str = "float16"
    """float16 or float32: the type of stored embeddings."""
    actors: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    """Fewest and most encoder actors."""
    device: str = "auto"
    address: str | None = None
    """A running Ray cluster; null starts one on this machine."""

    def __post_init__(self) -> None:
        for key in ("data", "autoencoder_from", "out"):
            if not getattr(self, key):
                raise ConfigError("This setting is needed.", where=key, mend=f"Add {key}=<path or URI>.")
        if self.batch_size < 1:
            raise ConfigError("A batch has at least one picture.", where="batch_size", mend="Set it to 64, say.")
        if self.text_dtype not in ("float16", "float32"):
            raise ConfigError("text_dtype takes float16 or float32.", where="text_dtype", mend="Correct it.")
        if len(self.actors) != 2 or not 1 <= self.actors[0] <= self.actors[1]:
            raise ConfigError("actors takes [fewest, most].", where="actors", mend="Set actors=[1,2], say.")
