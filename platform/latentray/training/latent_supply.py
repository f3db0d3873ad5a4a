"""Where stage 2's latents come from: a store of them, or pictures that each worker encodes as it goes.

A source gives batches as they are read, and makes a LatentBatch of each. The step does not know which source it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from latentray import build, randomness
from latentray.checkpoint import store
from latentray.conditioning import beside, combination, denoiser_inputs
from latentray.conditioning.encoders import Encoder, ImageEncoder, load_configured
from latentray.config.denoiser import DenoiserConfig
from latentray.config.train import Train
from latentray.data import canonical, latents
from latentray.data.canonical import CaptionEmbedder, PictureEmbedder
from latentray.data.latent_batches import latent_batches
from latentray.data.latents import LatentStore, TextSource
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource
from latentray.data.sample_facts import SampleFacts, class_names
from latentray.data.transforms import Augment
from latentray.errors import FingerprintMismatch
from latentray.models.autoencoder import LatentScale, Posterior
from latentray.randomness import Purpose
from latentray.records import Conditions, EpisodeBatch, LatentBatch, PictureBatch, TextEmbedding
from latentray.training import denoiser_weights
from latentray.training.episode_supply import Episodes
from latentray.training.feed import Feed

Named = TypeVar("Named", bound=Encoder | TextSource)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LatentSpace:
    """What a run's latents and embeddings are: which encoders made them."""

    autoencoder_uri: str
    autoencoder_fingerprint: str
    scale: LatentScale
    texts: tuple[TextSource, ...]
    """The encoders that the denoiser reads."""
    empty: Conditions
    """One row: embeddings of the empty caption, or zeros, and the null class; for dropout and classifier-free guidance."""
    size: int
    """Pixels: side of the squares that a model learns to draw; with buckets the greatest resolution's."""
    frames: int = 0
    """Of each clip; 0 for pictures."""
    fps: float = 0.0
    """Frames per second; 0 for pictures."""
    classes: tuple[str, ...] = ()
    """Names of the class labels, where the data set names them."""
    zero_when_empty: bool = False
    """Zeros stand in `empty` for the empty caption's embeddings."""

    @property
    def facts(self) -> dict[str, object]:
        """The encoders' fingerprints."""
        return {"autoencoder": self.autoencoder_fingerprint, **by_encoder(self.texts, lambda one: one.fingerprint)}

    def require_autoencoder(self, artifact: build.AutoencoderArtifact) -> None:
        """Raise FingerprintMismatch unless this very autoencoder encoded what the run learnt from."""
        if artifact.fingerprint != self.autoencoder_fingerprint:
            raise FingerprintMismatch(
                f"The run's latents are of another autoencoder ({self.autoencoder_fingerprint[:12]}; this one is "
                f"{artifact.fingerprint[:12]}).",
                where=artifact.uri,
                mend="Give the autoencoder that the run began with.",
            )


class Space(Protocol):
    """What stage 2 needs to know of what it learns from."""

    @property
    def scale(self) -> LatentScale: ...

    @property
    def empty(self) -> Conditions: ...

    @property
    def facts(self) -> dict[str, object]: ...


class LatentSource(Protocol):
    """What stage 2 needs of each source."""

    feed: Feed
    inputs: dict[str, str]
    """Digests of what the run learns from, for lineage."""

    @property
    def space(self) -> Space: ...

    def batches(self, source: OrderedSource) -> Iterator[LatentBatch] | Iterator[PictureBatch] | Iterator[EpisodeBatch]:
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
        self.space = _space_of(latents.describe(first.uri, first.manifest), config)
        self.encoders = [one.name for one in self.space.texts]

    def batches(self, source: OrderedSource) -> Iterator[LatentBatch]:
        return latent_batches(source, encoders=self.encoders, workers=self.workers)

    def latents(self, batch: LatentBatch) -> LatentBatch:
        return batch


class OnlineLatents:
    """Pictures, encoded by a frozen autoencoder and text encoder that live in this worker.

    Latents and embeddings are rounded as a store would round them, so that both sources give the same numbers.
    """

    def __init__(self, config: Train, device: torch.device) -> None:
        self.online, self.workers, self.device = config.online, config.loader_workers, device
        self.beside, self.seed = config.beside, config.seed
        artifact = build.autoencoder_artifact(autoencoder_uri(config))
        self.autoencoder = canonical.load(artifact, device, config.online.precision)
        loaded = load_encoders(config, device)
        dtype, zero = getattr(torch, config.online.text_dtype), denoiser_weights.zero_when_dropped(config)
        self.embedders: list[CaptionEmbedder | PictureEmbedder] = [
            PictureEmbedder(one, dtype) if isinstance(one, ImageEncoder) else CaptionEmbedder(one, dtype)
            for one, _ in loaded
        ]
        self.shown = {one.name: one.preprocessing for one, _ in loaded if isinstance(one, ImageEncoder)}
        self.space = LatentSpace(
            autoencoder_uri=artifact.uri,
            autoencoder_fingerprint=artifact.fingerprint,
            scale=artifact.scale,
            texts=tuple(TextSource.of(*one) for one in loaded),
            empty=empty(config.denoiser, [one.nothing() for one, _ in loaded], zero=zero),
            size=max(config.buckets.sizes, default=config.size),
            zero_when_empty=zero,
        )
        computed = [] if config.online.precision == "fp32" else [config.online.precision]
        self.feed = Feed.open(config, encoded_by=[*map(str, self.space.facts.values()), *computed])
        self.space = dataclasses.replace(self.space, classes=class_names(self.feed.sets[0]))
        self.told = SampleFacts(self.feed.sets)
        digests = by_encoder([one for one, _ in loaded], lambda one: one.digest)
        self.inputs = self.feed.inputs | {"autoencoder": artifact.digest} | digests

    def batches(self, source: OrderedSource) -> Iterator[PictureBatch]:
        augment = Augment(crop=self.online.crop, flip=self.online.flip)
        return picture_batches(source, shapes=self.feed.shapes, augment=augment, workers=self.workers, shown=self.shown)

    def latents(self, batch: PictureBatch) -> LatentBatch:
        """Raises DataError for latents that are no numbers."""
        x = batch.x_BCHW.to(self.device)
        posterior = self._encode(x)
        mean = posterior.mean_BChw.float()
        keys = randomness.keys_of(self.seed, Purpose.MASK, batch.ids, device=self.device)
        return LatentBatch(
            mean_BChw=mean,
            logvar_BChw=posterior.logvar_BChw.float(),
            given=Conditions(
                texts=tuple(self._embedded(one, batch) for one in self.embedders),
                size_B6=batch.size_B6,
                labels_B=self.told.labels(batch.ids),
                beside_BChw=beside.of_pictures(self.beside, x, keys, self._normalised, mean.shape[-2:]),
            ),
            ids=batch.ids,
            weight_B=batch.weight_B,
            damaged=batch.damaged,
            traffic=batch.traffic,
        )

    def _embedded(self, embedder: CaptionEmbedder | PictureEmbedder, batch: PictureBatch) -> TextEmbedding:
        if isinstance(embedder, PictureEmbedder):
            return embedder.embed(batch.views[embedder.encoder.name])
        return embedder.embed(batch.captions)

    def _encode(self, x_BCHW: Tensor) -> Posterior:
        return canonical.encode(
            self.autoencoder,
            x_BCHW,
            batch_size=self.online.batch_size,
            dtype=getattr(torch, self.online.latent_dtype),
            where=self.space.autoencoder_uri,
        )

    def _normalised(self, x_BCHW: Tensor) -> Tensor:
        return self.space.scale.normalise(self._encode(x_BCHW).mean_BChw.float())


_SOURCES: dict[str, Callable[[Train, torch.device], LatentSource]] = {
    "stored": StoredLatents,
    "online": OnlineLatents,
    "episodes": Episodes,
}


def kind(config: Train) -> str:
    """Which source the settings name: stored, online or episodes."""
    if config.denoiser.family == "policy":
        return "episodes"
    return "online" if config.online.enabled else "stored"


def open_source(config: Train, device: torch.device) -> LatentSource:
    """The source that the settings name, with the run's data sets opened. Raises as Feed.open does."""
    return _SOURCES[kind(config)](config, device)


def autoencoder_uri(config: Train, named: str = "") -> str:
    """The autoencoder that the settings name, else the one `named` by stored latents."""
    return store.absolute(config.autoencoder_from or named)


def load_encoders(config: Train, device: torch.device | str = "cpu") -> list[tuple[Encoder, str]]:
    """The online encoders that the denoiser reads, and where each is. Raises ConfigError for too few of them."""
    named = config.online.all_text_encoders
    wanted = named[: combination.taken(config.denoiser, len(named))]
    return [(load_configured(one, device=device), one.source) for one in wanted]


def by_encoder(encoders: Sequence[Named], value: Callable[[Named], str]) -> dict[str, str]:
    """What lineage calls text encoders: the first `text_encoder`, a further one `text_encoder.<name>`."""
    return {f"text_encoder.{one.name}" if i else "text_encoder": value(one) for i, one in enumerate(encoders)}


def empty(net: DenoiserConfig, texts: Sequence[TextEmbedding], *, zero: bool = False) -> Conditions:
    """What stands for "not told": the empty caption's embeddings, or zeros in their places, and the null class."""
    return Conditions(
        texts=denoiser_inputs.zeroed(texts) if zero else tuple(texts),
        labels_B=None if net.classes is None else torch.tensor([net.classes]),
    )


def _space_of(described: LatentStore, config: Train) -> LatentSpace:
    texts = described.texts[: combination.taken(config.denoiser, len(described.texts))]
    zero = denoiser_weights.zero_when_dropped(config)
    return LatentSpace(
        autoencoder_uri=autoencoder_uri(config, described.autoencoder_uri),
        autoencoder_fingerprint=described.autoencoder_fingerprint,
        scale=described.scale,
        texts=texts,
        empty=empty(config.denoiser, described.empty_prompts(texts), zero=zero),
        size=described.size,
        frames=described.frames,
        fps=described.fps,
        classes=described.classes,
        zero_when_empty=zero,
    )
