"""The latent store: what one holds, which autoencoder and text encoder it belongs to, and how to read it back.

Artifact of kind `latents`: WebDataset shards with the input's names, `index.parquet`, `empty_prompt.safetensors`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import safetensors.torch
import torch

from latentray.build import AutoencoderArtifact
from latentray.checkpoint import manifest, store, weights
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.errors import FingerprintMismatch
from latentray.models.autoencoder import LatentScale
from latentray.records import LATENT_MEMBER, RECORD_VERSION, TextEmbedding

KIND = "latents"
EMPTY_PROMPT = "empty_prompt.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStore:
    """One split of a latent store, described by its manifest."""

    uri: str
    key: str
    """Fingerprint of autoencoder, text encoder and preprocessing together."""
    autoencoder_uri: str
    autoencoder_fingerprint: str
    scale: LatentScale
    channels: int
    size: int
    """Pixels of the squares that were encoded."""
    encoder: str
    """Name of the text encoder in the records."""
    text_source: str
    text_fingerprint: str
    text_width: int
    listing: manifest.Manifest

    def empty_prompt(self) -> TextEmbedding:
        """The embedding of the empty caption, (1, ...): for caption dropout and classifier-free guidance."""
        tensors = weights.read(manifest.fetch_file(self.uri, EMPTY_PROMPT, self.listing))
        return TextEmbedding(
            tokens_BLD=tensors["tokens"].float(), mask_BL=tensors["mask"].bool(), pooled_BD=tensors["pooled"].float()
        )

    def require_autoencoder(self, artifact: AutoencoderArtifact) -> None:
        """Raise FingerprintMismatch unless this very autoencoder encoded the latents."""
        if artifact.fingerprint != self.autoencoder_fingerprint:
            raise FingerprintMismatch(
                "These latents were encoded by another autoencoder "
                f"({self.autoencoder_fingerprint[:12]}; this one is {artifact.fingerprint[:12]}).",
                where=f"{self.uri} and {artifact.uri}",
                mend="Give the autoencoder that encoded them, or precompute the latents again.",
            )


def describe(uri: str, listing: manifest.Manifest | None = None) -> LatentStore:
    """The store at a URI. Raises InputMissing or ArtifactError where there is none."""
    listing = listing or manifest.read(uri, kind=KIND)
    meta = listing.meta
    fields = {f.name for f in dataclasses.fields(LatentStore)} - {"uri", "listing", "scale"}
    return LatentStore(
        uri=uri, listing=listing, scale=LatentScale(**meta["scale"]), **{name: meta[name] for name in fields}
    )


def key_of(config: PrecomputeLatents, *, autoencoder_fingerprint: str, text_fingerprint: str, size: int) -> str:
    """Fingerprint of everything that decides a latent record's bytes beside the picture itself."""
    return store.digest_of(
        {
            "record_version": RECORD_VERSION,
            "autoencoder": autoencoder_fingerprint,
            "text_encoder": text_fingerprint,
            "text_name": config.text_encoder.name,
            "size": size,
            "flip_variants": config.flip_variants,
            "batch_size": config.batch_size,
            "text_dtype": config.text_dtype,
        }
    )


def record(
    mean: torch.Tensor, logvar: torch.Tensor, name: str, text: TextEmbedding, dtype: torch.dtype
) -> dict[str, bytes]:
    """The member of one latent record: mean, logvar (C,h,w) and the embeddings of its N captions."""
    tensors = {
        "mean": mean.contiguous(),
        "logvar": logvar.contiguous(),
        f"text.{name}.tokens": text.tokens_BLD.to(dtype).contiguous(),
        f"text.{name}.mask": text.mask_BL.contiguous(),
        f"text.{name}.pooled": text.pooled_BD.to(dtype).contiguous(),
    }
    return {LATENT_MEMBER: safetensors.torch.save(tensors)}


def meta_of(store_: LatentStore) -> dict[str, Any]:
    """What the manifest records: the inverse of `describe`."""
    values = dataclasses.asdict(dataclasses.replace(store_, listing=None))  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if name not in ("uri", "listing")}
