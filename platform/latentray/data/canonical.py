"""Encoding in one canonical shape, padded and cut back: what comes out does not depend on what was beside it.

So a latent, or a caption's embedding, is the same however many encoders there are, and whether it is stored first or
encoded while stage 2 trains.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from latentray.build import AutoencoderArtifact
from latentray.conditioning.encoders import CaptionEncoder, ImageEncoder, prefix
from latentray.conditioning.text import PRECISIONS
from latentray.errors import DataError
from latentray.models.autoencoder import KLAutoencoder, Posterior
from latentray.records import TextEmbedding

CAPTIONS_AT_ONCE = 16
"""The one shape captions, and pictures for vision encoders, are embedded in."""
_CACHED_TEXT_BYTES = 256 << 20


@torch.no_grad()
def load(artifact: AutoencoderArtifact, device: torch.device, precision: str) -> KLAutoencoder:
    """An artifact's autoencoder, frozen, ready to `encode` in fp32 or bf16."""
    layout = torch.channels_last if precision == "bf16" else torch.preserve_format
    return artifact.load().to(device, PRECISIONS[precision], memory_format=layout)


def encode(
    autoencoder: KLAutoencoder, x_BCHW: Tensor, *, batch_size: int, dtype: torch.dtype, where: str = ""
) -> Posterior:
    """Pictures in [-1, 1], on the autoencoder's device -> mean and log-variance there, computed in its type, rounded to `dtype`.

    Args:
        batch_size: how many go through the autoencoder at a time, always; the last batch is padded.
        where: the autoencoder, for the error.

    Raises DataError for latents that are no numbers in `dtype`.
    """
    means, logvars = [], []
    x_BCHW = x_BCHW.to(next(autoencoder.parameters(), x_BCHW).dtype)
    for some in x_BCHW.split(batch_size):
        whole = some
        if len(some) < batch_size:
            whole = some.new_full((batch_size, *some.shape[1:]), -1.0)
            whole[: len(some)] = some
        posterior = autoencoder.encode(whole)
        means.append(posterior.mean_BChw[: len(some)].to(dtype))
        logvars.append(posterior.logvar_BChw[: len(some)].to(dtype))
    mean, logvar = torch.cat(means), torch.cat(logvars)
    if not (mean.isfinite().all() and logvar.isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        raise DataError(
            f"Latents are not finite in {name}.",
            where=where,
            mend="Set latent_dtype=float32; if they still are not, the autoencoder is broken.",
        )
    return Posterior(mean_BChw=mean, logvar_BChw=logvar)


class CaptionEmbedder:
    """A text encoder that remembers what it embedded: captions repeat, from epoch to epoch and in small vocabularies."""

    def __init__(self, encoder: CaptionEncoder, dtype: torch.dtype, *, cached_bytes: int = _CACHED_TEXT_BYTES) -> None:
        self.encoder, self.dtype = encoder, dtype
        self.record = prefix(encoder.reading.kind, encoder.name)
        self._most = max(cached_bytes // (encoder.max_tokens * encoder.width * dtype.itemsize), 1)
        self._known: collections.OrderedDict[str, TextEmbedding] = collections.OrderedDict()

    def embed(self, captions: Sequence[str]) -> TextEmbedding:
        """A row for each caption, on the CPU, rounded to `dtype`."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        for i in range(0, len(missing), CAPTIONS_AT_ONCE):
            self._remember(missing[i : i + CAPTIONS_AT_ONCE])
        rows = [self._known[caption] for caption in captions]
        for caption in captions:
            self._known.move_to_end(caption)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return TextEmbedding.joined(rows)

    def _remember(self, captions: list[str]) -> None:
        padding = [""] * (CAPTIONS_AT_ONCE - len(captions))
        found = self.encoder.embed([*captions, *padding]).to(self.dtype)
        for i, caption in enumerate(captions):
            row = found.rows(slice(i, i + 1))
            self._known[caption] = TextEmbedding.joined([row])  # a copy: a view would keep its neighbours


class PictureEmbedder:
    """A vision encoder, always shown the same number of pictures."""

    def __init__(self, encoder: ImageEncoder, dtype: torch.dtype) -> None:
        self.encoder, self.dtype = encoder, dtype
        self.record = prefix(encoder.reading.kind, encoder.name)

    def embed(self, views_BHWC: Tensor) -> TextEmbedding:
        """A row for each view, uint8 (B, height, width, 3), on the CPU, rounded to `dtype`."""
        parts = []
        for some in views_BHWC.split(CAPTIONS_AT_ONCE):
            whole = some
            if len(some) < CAPTIONS_AT_ONCE:
                whole = some.new_zeros(CAPTIONS_AT_ONCE, *some.shape[1:])
                whole[: len(some)] = some
            parts.append(self.encoder.embed(whole).rows(slice(len(some))))
        return TextEmbedding.joined(parts).to(self.dtype)
