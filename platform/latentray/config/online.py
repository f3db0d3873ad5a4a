"""Stage 2 from pictures: what encodes them in the training worker, step by step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from latentray.config.feed import CROPS
from latentray.config.precompute_latents import DTYPES
from latentray.config.text_encoder import TextEncoderConfig, require_names, require_precision
from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class OnlineConfig:
    """Encode pictures and captions as they are trained on, instead of reading stored latents."""

    enabled: bool = False
    """Stage 2 reads `data`, and encodes it by `autoencoder_from` and the text encoder below."""
    text_encoder: str = "openai/clip-vit-large-patch14"
    """A local folder, an artifact's URI, or a hub id."""
    text_encoders: list[TextEncoderConfig] = dataclasses.field(default_factory=list)
    """Instead of that one, several, each under a name of its own, as precompute_latents takes them."""
    batch_size: int = 16
    """The one shape pictures are encoded in, the last batch padded; as stored latents', both are equal bit for bit."""
    precision: str = "fp32"
    """fp32 or bf16: what the autoencoder computes in."""
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
        require_precision(self.precision, where="online.precision")
        if self.crop not in CROPS:
            raise ConfigError(
                f"There is no crop {self.crop!r}.", where="online.crop", mend=f"Known: {', '.join(CROPS)}."
            )
        require_names(self.text_encoders, where="online.text_encoders")
        self.text_encoder = _absolute(self.text_encoder)
        for one in self.text_encoders:
            one.source = _absolute(one.source)

    @property
    def all_text_encoders(self) -> list[TextEncoderConfig]:
        return self.text_encoders or [TextEncoderConfig(source=self.text_encoder)]


def _absolute(source: str) -> str:
    """Workers start in folders of their own; a hub id looks like a path."""
    return str(Path(source).absolute()) if Path(source).is_dir() else source
