"""The encoders of a run, of any kind: text models, vision models, tokenizers alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latentray.conditioning import images, text, tokens
from latentray.conditioning.images import ImageEncoder
from latentray.conditioning.text import Reading, TextEncoder
from latentray.conditioning.tokens import TokenReader
from latentray.config.text_encoder import TextEncoderConfig

CaptionEncoder = TextEncoder | TokenReader
"""What reads captions."""
Encoder = CaptionEncoder | ImageEncoder
_LOADERS: dict[str, Callable[..., Encoder]] = (
    dict.fromkeys(text.KINDS, text.load)
    | dict.fromkeys(images.KINDS, images.load)
    | dict.fromkeys(tokens.KINDS, tokens.load)
)


def load(
    source: str, *, name: str = "clip", reading: Reading | None = None, device: torch.device | str = "cpu"
) -> Encoder:
    """An encoder from a local folder, an artifact's URI or a hub id; a CLIP's text model without a `reading`.

    Raises as `text.load` does.
    """
    reading = reading or Reading()
    return _LOADERS[reading.kind](source, name=name, reading=reading, device=device)


def load_configured(config: TextEncoderConfig, *, source: str = "", device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a configuration, from where it says or from another `source`. Raises as `load` does."""
    reading = Reading(kind=config.kind, layer=config.layer, max_tokens=config.max_tokens, precision=config.precision)
    return load(source or config.source, name=config.name, reading=reading, device=device)


def prefix(kind: str, name: str) -> str:
    """What an encoder's tensors are called in records: of captions `text.<name>`, of pictures `image.<name>`."""
    return f"image.{name}" if kind in images.KINDS else f"text.{name}"
