"""Embeddings by several encoders -> the one sequence of tokens and the one pooled vector that a denoiser reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.records import TextEmbedding

Texts = Sequence[TextEmbedding]


def _one(texts: Texts) -> TextEmbedding:
    return texts[0]


def _sdxl(texts: Texts) -> TextEmbedding:
    """Tokens side by side, 768 + 1280 wide; the pooled text is the last encoder's (Podell et al. 2023, section 2.1)."""
    return TextEmbedding(
        tokens_BLD=torch.cat([one.tokens_BLD for one in texts], dim=2),
        mask_BL=texts[-1].mask_BL,
        pooled_BD=texts[-1].pooled_BD,
    )


def _sd3(texts: Texts) -> TextEmbedding:
    """Both CLIPs side by side, filled up with zeros to T5's width, T5's tokens behind them (Esser et al. 2024, section 4)."""
    first, second, third = texts
    clips = torch.cat([first.tokens_BLD, second.tokens_BLD], dim=2)
    wide = F.pad(clips, (0, third.tokens_BLD.shape[2] - clips.shape[2]))
    return TextEmbedding(
        tokens_BLD=torch.cat([wide, third.tokens_BLD], dim=1),
        mask_BL=torch.cat([second.mask_BL, third.mask_BL], dim=1),
        pooled_BD=torch.cat([first.pooled_BD, second.pooled_BD], dim=1),
    )


def _sequence(texts: Texts) -> TextEmbedding:
    """Tokens one after the other, narrow ones filled up with zeros; pooled vectors side by side."""
    width = max(one.tokens_BLD.shape[2] for one in texts)
    return TextEmbedding(
        tokens_BLD=torch.cat([F.pad(one.tokens_BLD, (0, width - one.tokens_BLD.shape[2])) for one in texts], dim=1),
        mask_BL=torch.cat([one.mask_BL for one in texts], dim=1),
        pooled_BD=torch.cat([one.pooled_BD for one in texts], dim=1),
    )


_RULES: dict[str, Callable[[Texts], TextEmbedding]] = {
    "one": _one,
    "sdxl": _sdxl,
    "sd3": _sd3,
    "sequence": _sequence,
}
_COUNTS = {"one": 1, "sdxl": 2, "sd3": 3}
"""How many encoders a rule combines; the others take any number."""


def taken(config: DenoiserConfig, there: int) -> int:
    """How many of the encoders that are there, from the first, a denoiser reads. Raises ConfigError for too few."""
    if not config.reads_text:
        return 0
    wanted = _COUNTS.get(config.combine, max(there, 1))
    if there < wanted:
        raise ConfigError(
            f"It reads {wanted} text encoder{'s' if wanted > 1 else ''}, and there are embeddings by {there or 'none'}.",
            where="denoiser.combine",
            mend="Give as many (text_encoders of precompute_latents, online.text_encoders), or change it.",
        )
    return wanted


def combine(config: DenoiserConfig, texts: Texts) -> TextEmbedding | None:
    """What the denoiser reads of them; None where it reads no text.

    Raises ConfigError for encoders that cannot be combined so.
    """
    if not config.reads_text:
        return None
    try:
        return _RULES[config.combine](texts)
    except (RuntimeError, ValueError):
        shapes = ", ".join(f"{one.tokens_BLD.shape[1]} tokens of {one.tokens_BLD.shape[2]}" for one in texts)
        raise ConfigError(
            f"{config.combine} does not combine encoders of {shapes}.",
            where="denoiser.combine",
            mend="Give other encoders, or change it.",
        ) from None
