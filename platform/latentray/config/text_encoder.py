"""Group `text_encoder`: what embeds captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from latentray.errors import ConfigError

KINDS = ("clip", "clip_projection", "t5", "clip_vision", "tokens")
ENCODER_PRECISIONS = ("fp32", "bf16")
"""What encoders that are not trained can compute in."""
COUNTED = ("t5", "tokens")
"""Kinds whose number of tokens is a setting."""


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
    """A transformers text model and its tokenizer."""

    name: str = "clip"
    """Name of the encoder in latent records: `text.<name>.tokens`, of pictures `image.<name>.tokens`."""
    source: str = "openai/clip-vit-large-patch14"
    """A local folder, an artifact's URI, or a hub id `owner/name`, with `@revision` behind it where one is meant."""
    kind: str = "clip"
    """clip (CLIPTextModel; its pooled text is the last token's), clip_projection (CLIPTextModelWithProjection; the pooled text is
    projected: OpenCLIP's, and both of SD 3's) or t5 (T5EncoderModel; no pooled text); clip_vision (CLIPVisionModelWithProjection)
    reads each sample's own picture, for variations of pictures; tokens is a tokenizer alone, for a denoiser with
    context_layers."""
    layer: int = 1
    """Which hidden states become tokens, counted from the last: 1 is what the model gives, normalised; 2 what goes into its last
    layer, not normalised (SDXL, SD 3)."""
    max_tokens: int | None = None
    """t5 and tokens: captions are padded and cut to so many tokens; null is 256 and 77. CLIP has its own number."""
    precision: str = "fp32"
    """fp32 or bf16: what the network computes in, where it embeds captions to train on and where the model draws. In bf16 T5 XXL
    takes 9.5 GB and not 19."""
    build: TinyTextEncoderConfig | None = None
    """Make a tiny encoder with its own tokenizer at `source` instead of loading one (for runs without downloads)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"There is no kind {self.kind!r}.", where="text_encoder.kind", mend=f"Known: {', '.join(KINDS)}."
            )
        if self.layer < 1:
            raise ConfigError("The last is 1.", where="text_encoder.layer", mend="Set it to 1, or 2 for SDXL and SD 3.")
        if self.max_tokens is not None and (self.kind not in COUNTED or self.max_tokens < 1):
            raise ConfigError(
                "Only t5 and tokens take a number of tokens, at least 1.",
                where="text_encoder.max_tokens",
                mend="Leave it null.",
            )
        require_precision(self.precision, where="text_encoder.precision")
        if self.kind == "tokens" and self.precision != "fp32":
            raise ConfigError(
                "A tokenizer alone computes nothing.",
                where="text_encoder.precision",
                mend="Set it to fp32.",
            )
        if self.build is not None and self.kind != "clip":
            raise ConfigError(
                "Tiny encoders are made of kind clip.", where="text_encoder.build", mend="Set it to null."
            )


def require_precision(precision: str, *, where: str) -> None:
    """Raise ConfigError for one that encoders cannot compute in."""
    if precision not in ENCODER_PRECISIONS:
        raise ConfigError(f"{where} takes {', '.join(ENCODER_PRECISIONS)}.", where=where, mend="Correct it.")


def require_names(encoders: Sequence[TextEncoderConfig], *, where: str) -> None:
    """Raise ConfigError unless each encoder has a name of its own that can stand in a record."""
    names = [one.name for one in encoders]
    if len(set(names)) < len(names) or any(not name or "." in name or "/" in name for name in names):
        raise ConfigError(
            f"The text encoders are called {', '.join(names)}.",
            where=where,
            mend="Give each a name of its own, without a dot.",
        )
