"""What a classifier's training leaves: its folder, measured on held-out latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.data.latents import LABEL
from latentray.data.shards import IndexedShards
from latentray.diffusion import timesteps
from latentray.evaluation import noisy_classifiers
from latentray.inference import classifier_folder
from latentray.models.noisy_classifier import NoisyClassifier
from latentray.tracking import names
from latentray.training.export import Exported
from latentray.training.feed import Feed
from latentray.training.latent_supply import LatentSpace
from latentray.training.state import Worker

_SAMPLES = 2048


def classifier(
    worker: Worker,
    state: Mapping[str, Tensor],
    space: LatentSpace,
    feed: Feed,
    *,
    inputs: Mapping[str, str],
    facts: Mapping[str, object],
) -> Exported:
    """Publish the averaged weights as the artifact `<out>/classifier`."""
    config = worker.config
    artifact = build.autoencoder_artifact(space.autoencoder_uri)
    space.require_autoencoder(artifact)
    lineage = dict(inputs) | {"autoencoder": artifact.digest}
    net = build.denoiser(config.denoiser, state).to(worker.device)
    assert isinstance(net, NoisyClassifier)
    figures = _measured(worker, net, artifact, space, feed)
    samples = feed.order.samples_before(feed.order.steps_to(config.total_samples))
    meta: dict[str, Any] = {"figures": figures, "run": worker.run, "samples": samples, **facts}
    uri = store.join(worker.out, classifier_folder.KIND)
    with store.staging() as folder:
        classifier_folder.write(
            folder,
            config=config.denoiser,
            state=state,
            objective=config.objective,
            latents=artifact.fingerprint,
            class_names=space.classes,
        )
        listing = manifest.publish(
            folder,
            uri,
            kind=classifier_folder.KIND,
            inputs=lineage,
            config=compose.to_dict(config),
            meta=meta,
            replace=True,
        )
    if figures:
        print(f"classifier: accuracy {figures['accuracy']:.3f} over all noise levels", flush=True)
    return Exported(
        kind=classifier_folder.KIND,
        uri=uri,
        digest=listing.digest,
        inputs=lineage,
        metrics=_metrics(figures),
        pictures={},
        meta=meta,
    )


def _measured(
    worker: Worker, net: NoisyClassifier, artifact: build.AutoencoderArtifact, space: LatentSpace, feed: Feed
) -> dict[str, float]:
    """Figures on the validation split, on the training split where there is none with labels."""
    training = feed.sets[0]
    where = store.join(store.parent(training.uri), "validation")
    shards = training
    if store.exists(store.join(where, manifest.NAME)):
        held_out = IndexedShards.open(where, kind=training.manifest.kind)
        shards = held_out if LABEL in held_out.columns else training
    if noisy_classifiers.is_latents(shards):
        samples = noisy_classifiers.stored(shards, space.scale, limit=_SAMPLES)
    else:
        samples = noisy_classifiers.encoded(
            shards,
            artifact.load().to(worker.device),
            space.scale,
            size=worker.config.size,
            limit=_SAMPLES,
            device=worker.device,
        )
    return noisy_classifiers.measure(net, worker.config.objective, samples, seed=worker.config.seed)


def _metrics(figures: Mapping[str, float]) -> dict[str, float]:
    if not figures:
        return {}
    thirds = {
        names.accuracy_at(name, of=names.VALIDATION_ACCURACY): figures[f"accuracy_at_{name}"]
        for name in timesteps.THIRDS
    }
    return {names.VALIDATION_LOSS: figures["loss"], names.VALIDATION_ACCURACY: figures["accuracy"], **thirds}
