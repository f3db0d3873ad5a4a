"""What stage 2 leaves: the model folder, with everything needed to sample, and pictures drawn from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.conditioning import text
from latentray.config import compose
from latentray.data import members
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, DigestMismatch
from latentray.evaluation import autoencoders
from latentray.inference import model_folder
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.records import LATENT_MEMBER, PICTURE_SUFFIXES
from latentray.reporting import pictures
from latentray.tracking import names
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
    encoder = text.load(space.text.source, name=space.text.name)
    defaults = model_folder.SamplingDefaults(
        sampler=config.stage.sampler, steps=config.stage.sampling_steps, guidance_scale=config.stage.guidance_scale
    )
    lineage = dict(inputs) | {"autoencoder": artifact.digest, "text_encoder": encoder.digest}
    samples = feed.order.samples_before(feed.order.steps_to(config.total_samples))
    meta = {"run": worker.run, "samples": samples, **facts}
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
            text_encoder=encoder,
            defaults=defaults,
            size=space.size,
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
    """Pictures drawn from captions of the training set, as one grid, uint8 (H, W, 3)."""
    sampler = TextToImage.load(model_uri, device=device)
    captions = sorted(set(_captions(training, 8 * _SAMPLES))) or [""]
    captions = [captions[i] for i in autoencoders.spread(len(captions), _SAMPLES)]
    requests = [
        SamplingRequest(
            prompt=caption,
            steps=sampler.defaults.steps,
            guidance_scale=sampler.defaults.guidance_scale,
            seed=number,
            sampler=sampler.defaults.sampler,
            height=sampler.size,
            width=sampler.size,
        )
        for number, caption in enumerate(captions)
    ]
    drawn = [picture.pixels_HWC for picture in sampler.sample(requests)]
    return np.asarray(pictures.grid(drawn, columns=6, captions=captions, scale=2 if sampler.size <= 128 else 1))


def _captions(training: IndexedShards, count: int) -> Iterator[str]:
    """The first caption of samples spread over a data set of pictures or latents. Damage was dealt with in training."""
    for x in autoencoders.spread(training.count, count):
        try:
            yield members.captions_of(members.decode_sample(training.read(x), as_bytes=_NOT_TEXTS))[0]
        except (DataError, DigestMismatch):
            continue
