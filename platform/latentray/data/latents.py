"""The latent store: what one holds, which autoencoder and text encoders it belongs to, and how a record is written.

Artifact of kind `latents`: WebDataset shards with the input's names, `index.arrow` (with `source_sha256`, `variant`, and the
`height` and `width` of what was encoded), `rejected.jsonl`, and with text `empty_prompt.safetensors`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

from latentray.build import AutoencoderArtifact
from latentray.checkpoint import manifest, store, weights
from latentray.conditioning import encoders
from latentray.conditioning.encoders import Encoder, Reading, TokenReader
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import COUNTED
from latentray.errors import FingerprintMismatch
from latentray.models.autoencoder import LatentScale
from latentray.records import LATENT_MEMBER, RECORD_VERSION, TextEmbedding

KIND = "latents"
EMPTY_PROMPT = "empty_prompt.safetensors"
CONDITIONS = ("original_height", "original_width", "crop_top", "crop_left")
"""Columns of the index, pixels: what SDXL is told of a picture beside `height` and `width`, the size of the crop."""
LABEL = "label"
"""Column of the index: a class label, where the pictures say one."""
OF_CLIPS = ("frames", "fps")
"""Columns of the index of latents of clips: T, and frames per second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """An encoder whose embeddings a store holds, of captions or pictures."""

    name: str
    """Its name in the records: `text.<name>.tokens`, of pictures `image.<name>.tokens`."""
    source: str
    """Where it is: a folder, an artifact's URI or a hub id."""
    fingerprint: str
    width: int
    """Of a token's embedding."""
    max_tokens: int
    kind: str = "clip"
    layer: int = 1
    precision: str = "fp32"
    """What it computes in."""
    vocabulary: int = 0
    """Of a tokenizer alone: token numbers lie below it."""

    @property
    def record(self) -> str:
        """What its tensors' names begin with in a record."""
        return encoders.prefix(self.kind, self.name)

    @classmethod
    def of(cls, encoder: Encoder, source: str) -> TextSource:
        """An encoder that was loaded from `source`."""
        return cls(
            name=encoder.name,
            source=source,
            fingerprint=encoder.fingerprint,
            width=encoder.width,
            max_tokens=encoder.max_tokens,
            kind=encoder.reading.kind,
            layer=encoder.reading.layer,
            precision=encoder.reading.precision,
            vocabulary=encoder.vocabulary if isinstance(encoder, TokenReader) else 0,
        )

    def load(self, device: torch.device | str = "cpu") -> Encoder:
        """The encoder. Raises FingerprintMismatch where it is not the one it was."""
        limit = self.max_tokens if self.kind in COUNTED else None
        reading = Reading(kind=self.kind, layer=self.layer, max_tokens=limit, precision=self.precision)
        found = encoders.load(self.source, name=self.name, reading=reading, device=device)
        if found.fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                f"The text encoder {self.name} has changed since these embeddings were made.",
                where=self.source,
                mend="Bring back the one they were made with, or precompute the latents again.",
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStore:
    """One split of a latent store, described by its manifest."""

    uri: str
    key: str
    """Fingerprint of autoencoder, text encoders and preprocessing together."""
    autoencoder_uri: str
    autoencoder_fingerprint: str
    scale: LatentScale
    channels: int
    size: int
    """Pixels: side of the squares that were encoded; with buckets of the greatest resolution's square."""
    buckets: tuple[tuple[int, int], ...] = ()
    """(height, width) of the shapes that records may have; none where all are squares of `size`."""
    frames: int = 0
    """T of every record, which is (T, C, h, w); 0 for pictures."""
    fps: float = 0.0
    """Frames per second; 0 for pictures."""
    texts: tuple[TextSource, ...]
    """The text encoders in the records; none where latents stand alone."""
    classes: tuple[str, ...] = ()
    """Names of the class labels, where the data set names them."""
    variants: tuple[int, ...]
    """What each picture or clip was encoded as (latent_plan)."""
    listing: manifest.Manifest

    def empty_prompts(self, sources: Sequence[TextSource]) -> tuple[TextEmbedding, ...]:
        """What each encoder says of nothing, (1, ...): for caption dropout and classifier-free guidance."""
        if not sources:
            return ()
        tensors = weights.read(manifest.fetch_file(self.uri, EMPTY_PROMPT, self.listing))
        return tuple(
            TextEmbedding(
                tokens_BLD=tensors[f"{one.record}.tokens"],
                mask_BL=tensors[f"{one.record}.mask"].bool(),
                pooled_BD=tensors[f"{one.record}.pooled"],
            ).to(torch.float32)
            for one in sources
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

    def require_like(self, other: LatentStore) -> None:
        """Raise FingerprintMismatch unless both stores were made by the same encoders, so that one model can learn from both."""
        for what in ("channels", "scale", "frames", "fps"):
            if getattr(self, what) != getattr(other, what):
                raise self._unlike(other, what)
        if [(one.name, one.fingerprint) for one in self.texts] != [(one.name, one.fingerprint) for one in other.texts]:
            raise self._unlike(other, "text encoders")

    def _unlike(self, other: LatentStore, what: str) -> FingerprintMismatch:
        return FingerprintMismatch(
            f"These latents differ in {what} and cannot be mixed.",
            where=f"{self.uri} and {other.uri}",
            mend="Precompute both with the same autoencoder, text encoders and clip settings.",
        )


def describe(uri: str, listing: manifest.Manifest | None = None) -> LatentStore:
    """The store at a URI. Raises InputMissing or ArtifactError where there is none."""
    listing = listing or manifest.read(uri, kind=KIND)
    meta = listing.meta
    named = {"uri", "listing", "scale", "texts", "variants", "buckets", "classes"}
    fields = {f.name for f in dataclasses.fields(LatentStore)} & meta.keys() - named
    return LatentStore(
        uri=uri,
        listing=listing,
        scale=LatentScale(**meta["scale"]),
        texts=tuple(TextSource(**one) for one in meta["texts"]),
        variants=tuple(meta["variants"]),
        classes=tuple(meta.get("classes", ())),
        buckets=tuple((height, width) for height, width in meta.get("buckets", ())),
        **{name: meta[name] for name in fields},
    )


def meta_of(store_: LatentStore) -> dict[str, Any]:
    """What the manifest records: the inverse of `describe`."""
    values = dataclasses.asdict(dataclasses.replace(store_, listing=None))  # type: ignore[arg-type]
    values |= {name: list(values[name]) for name in ("texts", "variants", "classes")}
    values["buckets"] = [list(shape) for shape in values["buckets"]]
    return {name: value for name, value in values.items() if name not in ("uri", "listing")}


def key_of(
    config: PrecomputeLatents,
    *,
    autoencoder_fingerprint: str,
    texts: Sequence[TextSource],
    size: int | None,
    frames: int = 0,
    fps: float = 0.0,
) -> str:
    """Fingerprint of everything that decides a latent record's bytes beside the picture, its variant and its captions.

    With buckets `size` is None and the shape is the record's own, so that stores of other buckets share what they can. Not
    of the batch size: rows of one batch do not see each other, and between batch sizes they differ by rounding alone.
    """
    decides = {
        "record_version": RECORD_VERSION,
        "autoencoder": autoencoder_fingerprint,
        "text_encoders": [[one.name, one.fingerprint] for one in texts],
        "size": size,
        "latent_dtype": config.latent_dtype,
        "text_dtype": config.text_dtype,
    }
    of_clips = {"frames": frames, "fps": fps} if frames else {}
    computed = {"precision": config.precision} if config.precision != "fp32" else {}
    return store.digest_of(decides | of_clips | computed)


def text_tensors(record: str, text: TextEmbedding, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Embeddings by the encoder whose tensors' names begin with `record`, as a record holds them."""
    text = text.to(dtype)
    return {
        f"{record}.tokens": text.tokens_BLD.contiguous(),
        f"{record}.mask": text.mask_BL.contiguous(),
        f"{record}.pooled": text.pooled_BD.contiguous(),
    }


def record(mean: torch.Tensor, logvar: torch.Tensor, texts: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    """The member of one record: mean, logvar (C,h,w) or (T,C,h,w) and the embeddings of its N captions (`text_tensors`)."""
    tensors = {"mean": mean.contiguous(), "logvar": logvar.contiguous()}
    return {LATENT_MEMBER: safetensors.torch.save(tensors | {n: t.contiguous() for n, t in texts.items()})}
