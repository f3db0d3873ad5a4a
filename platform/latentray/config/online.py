"""Stage 2 from pictures: what encodes them in the training worker, step by step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from latentray.config.feed import CROPS
from latentray.config.precompute_latents import DTYPES
from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class OnlineConfig:
    """Encode pictures and captions as they are trained on, instead of reading stored latents."""

    enabled: bool = False
    """Stage 2 reads `data`, and encodes it by `autoencoder_from` and the text encoder below."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """A local folder, an artifact's URI, or a hub id."""
    batch_size: int = 16
    """The one shape pictures are encoded in, the last batch padded; as stored latents', both are equal bit for bit."""
    latent_dtype: str = "float32"
    """float16, bfloat16 or float32: what mean and log-variance are rounded to, as they would be stored."""
    text_dtype: str = "float16"
    """float16, bfloat16 or float32: what embeddings are rounded to."""
    crop: str = "centre"
    """Where pictures are cut, centre or random."""
    flip: bool = False
    """Mirror half of the pictures."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError("It must be at least 1.", where="online.batch_size", mend="Raise online.batch_size.")
        for key in ("latent_dtype", "text_dtype"):
            if getattr(self, key) not in DTYPES:
                raise ConfigError(f"{key} takes {', '.join(DTYPES)}.", where=f"online.{key}", mend="Correct it.")
        if self.crop not in CROPS:
            raise ConfigError(
                f"There is no crop {self.crop!r}.", where="online.crop", mend=f"Known: {', '.join(CROPS)}."
            )
        if Path(self.text_encoder).is_dir():  # workers start in folders of their own; a hub id looks like a path
            self.text_encoder = str(Path(self.text_encoder).absolute())
