"""What stage 2 leaves: the model folder, with everything needed to sample, and pictures drawn from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.data import members
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, DigestMismatch
from latentray.evaluation import autoencoders
from latentray.inference import model_folder
from latentray.inference.examples import example, given, repair
from latentray.inference.sampling import TextToImage
from latentray.records import LATENT_MEMBER, PICTURE_SUFFIXES
from latentray.reporting import pictures
from latentray.tracking import names
from latentray.training import denoiser_weights, latent_supply
from latentray.training.export import Exported
from latentray.training.feed import Feed
from latentray.training.latent_supply import LatentSpace
from latentray.training.state import Worker

_SAMPLES = 12
_NOT_TEXTS = (*PICTURE_SUFFIXES, LATENT_MEMBER)


def model(
    worker: Worker,
    state: Mapping[str, Tensor],
    space: LatentSpace,
    feed: Feed,
    *,
    inputs: Mapping[str, str],
    facts: Mapping[str, object],
) -> Exported:
    """Gather denoiser, autoencoder and text encoder into the artifact `<out>/model`."""
    config = worker.config
    artifact = build.autoencoder_artifact(space.autoencoder_uri)
    space.require_autoencoder(artifact)
    encoders = [one.load() for one in space.texts]
    defaults = model_folder.SamplingDefaults(
        sampler=config.stage.sampler, steps=config.stage.sampling_steps, guidance_scale=config.stage.guidance_scale
    )
    digests = latent_supply.by_encoder(encoders, lambda one: one.digest)
    lineage = dict(inputs) | {"autoencoder": artifact.digest} | digests
    samples = feed.order.samples_before(feed.order.steps_to(config.total_samples))
    meta = {"run": worker.run, "samples": samples, **denoiser_weights.origin(config), **facts}
    uri = store.join(worker.out, "model")
    with store.staging() as folder:
        model_folder.write(
            folder,
            autoencoder_config=artifact.config,
            autoencoder_weights=artifact.weights,
            scale=artifact.scale,
            denoiser_config=config.denoiser,
            denoiser_state=state,
            objective=config.objective,
            text_encoders=encoders,
            defaults=defaults,
            size=space.size,
            beside=config.beside,
            frames=space.frames,
            fps=space.fps,
            classes=space.classes,
            zero_when_empty=space.zero_when_empty,
            latents=artifact.fingerprint,
        )
        listing = manifest.publish(
            folder, uri, kind="model", inputs=lineage, config=compose.to_dict(config), meta=meta, replace=True
        )
    grid = sample_grid(uri, feed.sets[0], str(worker.device))
    return Exported(
        kind="model",
        uri=uri,
        digest=listing.digest,
        inputs=lineage,
        metrics={},
        pictures={names.PICTURES_SAMPLES: grid},
        meta=meta,
    )


def sample_grid(model_uri: str, training: IndexedShards, device: str) -> np.ndarray:
    """Pictures or clips drawn from captions of the training set, as one sheet, uint8 (H, W, 3)."""
    sampler = TextToImage.load(model_uri, device=device)
    if sampler.makes_larger or sampler.takes_mask:
        return _repaired(sampler, training)
    found = sorted(set(_told(training, 8 * _SAMPLES))) or [("", -1)]
    chosen = [found[i] for i in autoencoders.spread(len(found), _SAMPLES)]
    captions, labels = [caption for caption, _ in chosen], [label for _, label in chosen]
    requests = [
        example(sampler, caption, seed=number, label=label)
        for number, (caption, label) in enumerate(zip(captions, labels, strict=True))
    ]
    if sampler.classes is not None:
        captions = [f"{sampler.name_of(label)}: {caption}" for caption, label in zip(captions, labels, strict=True)]
    drawn = [picture.pixels_HWC for picture in sampler.sample(requests)]
    scale = 2 if sampler.size <= 128 else 1
    if sampler.frames:
        return np.asarray(pictures.filmstrips(drawn, captions, scale=scale))
    return np.asarray(pictures.grid(drawn, columns=6, captions=captions, scale=scale))


def _repaired(sampler: TextToImage, training: IndexedShards) -> np.ndarray:
    """What a model that is given a picture made of some of the training set, between what it was given and the originals."""
    originals = autoencoders.load_pictures(training, sampler.size, limit=_SAMPLES)
    captions = autoencoders.load_captions(training, limit=_SAMPLES)
    labels = autoencoders.load_labels(training, limit=_SAMPLES)
    requests = [
        repair(sampler, caption, original, seed=number, label=label)
        for number, (caption, original, label) in enumerate(zip(captions, originals, labels, strict=True))
    ]
    rows: dict[str, pictures.Row] = {
        "given": [next(iter(given(one).values())) for one in requests],
        "drawn": [one.pixels_HWC for one in sampler.sample(requests)],
        "original": originals,
    }
    scale = 2 if sampler.size <= 128 else 1
    return np.asarray(pictures.stacked(rows, columns=6, scale=scale, captions=captions))


def _told(training: IndexedShards, count: int) -> Iterator[tuple[str, int]]:
    """First caption and label, -1 for none, of samples spread over a data set of pictures or latents.

    Damage was dealt with in training.
    """
    rows = autoencoders.spread(training.count, count)
    for x, label in zip(rows, autoencoders.load_labels(training, limit=count), strict=True):
        try:
            yield members.captions_of(members.decode_sample(training.read(x), as_bytes=_NOT_TEXTS))[0], label
        except (DataError, DigestMismatch):
            continue
