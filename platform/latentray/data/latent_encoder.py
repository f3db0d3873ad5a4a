"""The second stage of encoding: pictures to latents and captions to embeddings, on the accelerator.

Everything is encoded in one canonical shape, padded and cut back: what comes out does not depend on what was beside it, so
not on the number of encoders either.
"""

from __future__ import annotations

import collections

import torch

from latentray import build
from latentray.conditioning import text
from latentray.data import latents
from latentray.data.latent_parts import FROM_RECORD, Job, Parcel
from latentray.errors import DataError

_CAPTIONS_AT_ONCE = 16
"""The one shape captions are embedded in."""
_CACHED_TEXT_BYTES = 256 << 20


class Encoder:
    """Autoencoder and text encoders, loaded once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.device = build.device(job.device)
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # an encoder asks Ray for one core
        self.autoencoder = build.autoencoder_artifact(job.autoencoder).load().to(self.device)
        self.texts = [_Embedder(one, job.text_dtype, self.device) for one in job.texts]

    def encode(self, parcel: Parcel) -> Parcel:
        """Pixels become `mean.<size>`, `logvar.<size>` (units, C, h, w); captions `text.<encoder>.tokens` (captions, L, D) ...

        `about` gets `captions`: the order of the embeddings. What was copied passes. Raises DataError for latents that are
        no numbers.
        """
        tensors = {name: t for name, t in parcel.tensors.items() if name.startswith("kept.")}
        for size in self.job.sizes:
            if f"pixels.{size}" in parcel.tensors:
                mean, logvar = self.latents(parcel.tensors[f"pixels.{size}"])
                tensors |= {f"mean.{size}": mean, f"logvar.{size}": logvar}
        shown = (unit["json"][0]["captions"] for unit in parcel.about["units"] if unit["from"] != FROM_RECORD)
        captions = list(dict.fromkeys(caption for several in shown for caption in several))
        for embedder in self.texts if captions else ():
            tensors |= embedder.embed(captions)
        return Parcel(about=parcel.about | {"captions": captions}, tensors=tensors)

    @torch.inference_mode()
    def latents(self, pixels_BHWC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 pixels -> (B, C, h, w) mean and log-variance, on the CPU, in the stored type."""
        dtype = getattr(torch, self.job.latent_dtype)
        means, logvars = [], []
        for some in pixels_BHWC.split(self.job.batch_size):
            whole = torch.zeros(self.job.batch_size, *some.shape[1:], dtype=torch.uint8)
            whole[: len(some)] = some
            x_BCHW = whole.to(self.device).permute(0, 3, 1, 2).contiguous().float().mul_(2 / 255).sub_(1)
            posterior = self.autoencoder.encode(x_BCHW)
            means.append(posterior.mean_BChw[: len(some)].to(dtype).cpu())
            logvars.append(posterior.logvar_BChw[: len(some)].to(dtype).cpu())
        mean, logvar = torch.cat(means), torch.cat(logvars)
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise DataError(
                f"Latents are not finite in {self.job.latent_dtype}.",
                where=self.job.autoencoder,
                mend="Set latent_dtype=float32; if they still are not, the autoencoder is broken.",
            )
        return mean, logvar


class _Embedder:
    """A text encoder that remembers what it embedded: captions repeat, between variants and in small vocabularies."""

    def __init__(self, source: latents.TextSource, dtype: str, device: torch.device) -> None:
        self.name, self.dtype = source.name, getattr(torch, dtype)
        self.encoder = text.load(source.source, name=source.name, device=device)
        self._most = max(_CACHED_TEXT_BYTES // (source.max_tokens * source.width * self.dtype.itemsize), 1)
        self._known: collections.OrderedDict[str, dict[str, torch.Tensor]] = collections.OrderedDict()

    def embed(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The tensors of `latents.text_tensors`, a row for each caption."""
        missing = [caption for caption in captions if caption not in self._known]
        for i in range(0, len(missing), _CAPTIONS_AT_ONCE):
            self._remember(missing[i : i + _CAPTIONS_AT_ONCE])
        rows = [self._known[caption] for caption in captions]
        for caption in captions:
            self._known.move_to_end(caption)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _remember(self, captions: list[str]) -> None:
        padding = [""] * (_CAPTIONS_AT_ONCE - len(captions))
        tensors = latents.text_tensors(self.name, self.encoder.embed([*captions, *padding]), self.dtype)
        for i, caption in enumerate(captions):
            self._known[caption] = {name: tensor[i : i + 1].clone() for name, tensor in tensors.items()}
