"""Where stage 2's latents come from: a store of them, or pictures that each worker encodes as it goes.

A source gives batches as they are read, and makes a LatentBatch of each. The step does not know which source it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch

from latentray import build
from latentray.checkpoint import store
from latentray.conditioning import text
from latentray.config.online import OnlineConfig
from latentray.config.train import Train
from latentray.data import latents
from latentray.data.canonical import CaptionEmbedder, encode
from latentray.data.latent_batches import latent_batches
from latentray.data.latents import LatentStore, TextSource
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource
from latentray.data.transforms import Augment
from latentray.errors import FingerprintMismatch
from latentray.models.autoencoder import LatentScale
from latentray.records import LatentBatch, PictureBatch, TextEmbedding
from latentray.training.feed import Feed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentSpace:
    """What a run's latents and embeddings are: which encoders made them."""

    autoencoder_uri: str
    autoencoder_fingerprint: str
    scale: LatentScale
    text: TextSource
    empty: TextEmbedding
    """Of the empty caption, (1, ...): for caption dropout and classifier-free guidance."""
    size: int
    """Pixels: side of the squares that a model learns to draw; with buckets the greatest resolution's."""

    @property
    def facts(self) -> dict[str, object]:
        """The encoders' fingerprints."""
        return {"autoencoder": self.autoencoder_fingerprint, "text_encoder": self.text.fingerprint}

    def require_autoencoder(self, artifact: build.AutoencoderArtifact) -> None:
        """Raise FingerprintMismatch unless this very autoencoder encoded what the run learnt from."""
        if artifact.fingerprint != self.autoencoder_fingerprint:
            raise FingerprintMismatch(
                f"The run's latents are of another autoencoder ({self.autoencoder_fingerprint[:12]}; this one is "
                f"{artifact.fingerprint[:12]}).",
                where=artifact.uri,
                mend="Give the autoencoder that the run began with.",
            )


class LatentSource(Protocol):
    """What stage 2 needs of either source."""

    feed: Feed
    space: LatentSpace
    inputs: dict[str, str]
    """Digests of what the run learns from, for lineage."""

    def batches(self, source: OrderedSource) -> Iterator[LatentBatch] | Iterator[PictureBatch]:
        """What is read for each step of an ordered source."""

    def latents(self, batch) -> LatentBatch:
        """One of these batches as latents and embeddings."""


class StoredLatents:
    """Latents that precompute_latents wrote."""

    def __init__(self, config: Train, device: torch.device) -> None:
        self.feed = Feed.open(config)
        self.inputs = self.feed.inputs
        self.workers = config.loader_workers
        first = self.feed.sets[0]
        described = latents.describe(first.uri, first.manifest)
        self.space = _space_of(described, config)

    def batches(self, source: OrderedSource) -> Iterator[LatentBatch]:
        return latent_batches(source, encoder=self.space.text.name, workers=self.workers)

    def latents(self, batch: LatentBatch) -> LatentBatch:
        return batch


class OnlineLatents:
    """Pictures, encoded by a frozen autoencoder and text encoder that live in this worker.

    Latents and embeddings are rounded as a store would round them, so that both sources give the same numbers.
    """

    def __init__(self, config: Train, device: torch.device) -> None:
        self.online, self.workers, self.device = config.online, config.loader_workers, device
        artifact = build.autoencoder_artifact(autoencoder_uri(config))
        self.autoencoder = artifact.load().to(device)
        encoder = text.load(config.online.text_encoder, device=device)
        self.embedder = CaptionEmbedder(encoder, getattr(torch, config.online.text_dtype))
        self.space = LatentSpace(
            autoencoder_uri=artifact.uri,
            autoencoder_fingerprint=artifact.fingerprint,
            scale=artifact.scale,
            text=text_source(encoder, config.online),
            empty=encoder.embed([""]),
            size=max(config.buckets.sizes, default=config.size),
        )
        self.feed = Feed.open(config, encoded_by=[str(one) for one in self.space.facts.values()])
        self.inputs = self.feed.inputs | {"autoencoder": artifact.digest, "text_encoder": encoder.digest}

    def batches(self, source: OrderedSource) -> Iterator[PictureBatch]:
        augment = Augment(crop=self.online.crop, flip=self.online.flip)
        return picture_batches(source, shapes=self.feed.shapes, augment=augment, workers=self.workers)

    def latents(self, batch: PictureBatch) -> LatentBatch:
        """Raises DataError for latents that are no numbers."""
        posterior = encode(
            self.autoencoder,
            batch.x_BCHW.to(self.device),
            batch_size=self.online.batch_size,
            dtype=getattr(torch, self.online.latent_dtype),
            where=self.space.autoencoder_uri,
        )
        return LatentBatch(
            mean_BChw=posterior.mean_BChw.float(),
            logvar_BChw=posterior.logvar_BChw.float(),
            text=self.embedder.embed(batch.captions),
            ids=batch.ids,
            weight_B=batch.weight_B,
            size_B6=batch.size_B6,
            damaged=batch.damaged,
            traffic=batch.traffic,
        )


def open_source(config: Train, device: torch.device) -> LatentSource:
    """The source that the settings name, with the run's data sets opened. Raises as Feed.open does."""
    return OnlineLatents(config, device) if config.online.enabled else StoredLatents(config, device)


def autoencoder_uri(config: Train, named: str = "") -> str:
    """The autoencoder that the settings name, else the one `named` by stored latents."""
    return store.absolute(config.autoencoder_from or named)


def text_source(encoder: text.TextEncoder, config: OnlineConfig) -> TextSource:
    """An online text encoder, described as stores describe theirs."""
    return TextSource(
        name=encoder.name,
        source=config.text_encoder,
        fingerprint=encoder.fingerprint,
        width=encoder.width,
        max_tokens=encoder.max_tokens,
    )


def _space_of(described: LatentStore, config: Train) -> LatentSpace:
    return LatentSpace(
        autoencoder_uri=autoencoder_uri(config, described.autoencoder_uri),
        autoencoder_fingerprint=described.autoencoder_fingerprint,
        scale=described.scale,
        text=described.text,
        empty=described.empty_prompt(),
        size=described.size,
    )
