"""Group `text_encoder`: what embeds captions."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class TinyTextEncoderConfig:
    """A small CLIP text model with random weights and a BPE tokenizer trained on the data set's captions."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    max_tokens: int = 16
    vocabulary: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(
                "width must divide into heads.", where="text_encoder.build.width", mend="Choose a multiple of heads."
            )


@dataclasses.dataclass(kw_only=True)
class TextEncoderConfig:
    """A transformers CLIP text model and its tokenizer."""

    name: str = "clip"
    """Name of the encoder in latent records: `text.<name>.tokens`."""
    source: str = "openai/clip-vit-large-patch14"
    """A local folder, an artifact's URI, or a hub id."""
    build: TinyTextEncoderConfig | None = None
    """Make a tiny encoder with its own tokenizer at `source` instead of loading one (for runs without downloads)."""
