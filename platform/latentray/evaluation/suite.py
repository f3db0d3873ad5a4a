"""Evaluation of a model folder: held-out loss, FID and KID, and, for *shapes*, what the pictures show."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.data import sample_facts, synthetic
from latentray.data.shards import IndexedShards
from latentray.errors import ConfigError
from latentray.evaluation import autoencoders, feature_networks, heldout, metrics, pixel_checker
from latentray.inference.examples import example, smaller
from latentray.inference.sampling import TextToImage
from latentray.randomness import Purpose, mix
from latentray.registry.report import EvaluationReport, FeatureNetworkId, SamplerSettings
from latentray.reporting import pictures
from latentray.reporting.progress import Progress


def evaluate(config: Evaluate) -> str:
    """Measure, write the report artifact, and return its URI.

    Raises InputMissing, ArtifactError or DigestMismatch where model or data cannot be used, ConfigError for a sampler that
    does not fit the model.
    """
    model_uri, data = store.absolute(config.model or ""), store.absolute(config.data or "")
    out = store.absolute(config.out) if config.out else store.join(model_uri.rsplit("/", 1)[0], "report")
    listing = manifest.read(model_uri)
    training, validation = (IndexedShards.open(store.join(data, split)) for split in ("train", "validation"))
    validation.verify()
    model = TextToImage.load(model_uri, device=config.device)
    if model.frames:
        raise ConfigError("The model draws clips.", where="suite", mend="Use suite=clips.")
    settings = SamplerSettings(
        sampler=config.sampler or model.defaults.sampler,
        steps=model.defaults.steps if config.steps is None else config.steps,
        guidance_scale=model.defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
    )
    limit = max(config.samples, config.heldout_samples)
    originals = autoencoders.load_pictures(validation, model.size, limit=limit)
    captions = autoencoders.load_captions(validation, limit=limit)
    labels = None
    if model.classes is not None:
        sample_facts.require_labels([validation], classes=model.classes)
        labels = autoencoders.load_labels(validation, limit=limit)
    first = slice(config.heldout_samples)
    figures = heldout.loss(
        model, originals[first], captions[first], seed=config.seed, labels=None if labels is None else labels[first]
    )
    network = feature_networks.of_dataset(
        store.join(data, "feature_network"), training, model.size, inception_weights=config.inception
    )
    card, _ = autoencoders.measure(
        model.autoencoder.float(), originals, perceptual=None, network=network, device=model.device
    )
    model.autoencoder.to(model.dtype)
    figures |= {f"autoencoder.{name}": value for name, value in card.items()}

    is_shapes = validation.manifest.meta.get("source") == "shapes" and not model.makes_larger and labels is None
    kinds = [kind for kind in synthetic.KINDS for _ in range(config.per_kind)] if is_shapes else []
    unseen = [kind for kind in synthetic.UNSEEN for _ in range(config.per_unseen_kind)] if is_shapes else []
    wanted = [synthetic.caption(kind) for kind in kinds] or captions[: config.samples]
    asked = [*wanted, *(synthetic.caption(kind) for kind in unseen)]
    given = [] if is_shapes else list(originals)
    drawn = draw(
        model, asked, settings, seed=config.seed, batch_size=config.batch_size, originals=given, labels=labels or ()
    )
    if model.makes_larger:
        each = metrics.psnr(torch.from_numpy(drawn) / 255, torch.from_numpy(originals[: len(drawn)]) / 255)
        figures["super_resolution.psnr"] = float(each.mean())
    figures |= distribution(network, originals, drawn[: len(wanted)], seed=config.seed)
    if is_shapes:
        figures |= shapes_figures(drawn[: len(kinds)], kinds, drawn[len(kinds) :], unseen)
    report = EvaluationReport(
        model=listing.digest,
        dataset=validation.manifest.digest,
        feature_network=FeatureNetworkId(name=network.name, digest=network.digest, resize=network.resize),
        samples=len(wanted),
        seed=config.seed,
        sampler=settings,
        metrics=figures,
    )
    with store.staging() as folder:
        (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
        shown = autoencoders.spread(len(wanted), 54)
        grid = _sheet(model, drawn[shown], [wanted[i] for i in shown], originals[shown] if model.makes_larger else None)
        pictures.save_png(grid, folder / "samples.png", {"sampler": settings.sampler, "steps": str(settings.steps)})
        inputs = {"model": listing.digest, "dataset": validation.manifest.digest}
        manifest.publish(folder, out, kind="report", inputs=inputs, config=compose.to_dict(config), replace=True)
    _print(report, out)
    print(f"Next: python -m jobs.promote model={model_uri} report={out} gates={'shapes' if is_shapes else 'default'}")
    return out


def _sheet(model: TextToImage, drawn: np.ndarray, captions: Sequence[str], originals: np.ndarray | None) -> Image.Image:
    """Pictures over their captions; of a super-resolution model between the small ones and the originals."""
    factor = model.makes_larger
    if originals is None:
        return pictures.grid(drawn, columns=9, captions=captions)
    small = [pictures.enlarged(smaller(model, one, factor), factor) for one in originals]
    rows: dict[str, pictures.Row] = {"given": small, "drawn": drawn, "original": originals}
    return pictures.stacked(rows, columns=9, captions=captions)


def draw(
    model: TextToImage,
    captions: Sequence[str],
    settings: SamplerSettings,
    *,
    seed: int,
    batch_size: int,
    originals: Sequence[np.ndarray] = (),
    labels: Sequence[int] = (),
) -> np.ndarray:
    """One picture per caption, uint8 (N,H,W,3); picture i's seed is a hash of (seed, i).

    Args:
        originals: what the first captions are of, for a model that is given more than a caption.
        labels: theirs, for a model of classes.
    """
    drawn = []
    with Progress(len(captions), "drawing") as progress:
        for i in range(0, len(captions), batch_size):
            requests = [
                example(
                    model,
                    caption,
                    seed=mix(seed, Purpose.DRAWING, i + j) >> 1,
                    label=labels[i + j] if i + j < len(labels) else None,
                    original_HWC=originals[i + j] if i + j < len(originals) else None,
                    sampler=settings.sampler,
                    steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                )
                for j, caption in enumerate(captions[i : i + batch_size])
            ]
            drawn += [picture.pixels_HWC for picture in model.sample(requests)]
            progress.update(len(drawn))
    return np.stack(drawn)


def distribution(
    network: feature_networks.FeatureNetwork, originals: np.ndarray, drawn: np.ndarray, *, seed: int
) -> dict[str, float]:
    """FID and KID of drawn pictures against originals; nothing where either has fewer than two."""
    if min(len(originals), len(drawn)) < 2:
        return {}
    real, fake = network.features_of(originals), network.features_of(drawn)
    subset = min(1000, len(real), len(fake))
    kid, kid_std = metrics.kernel_distance(real, fake, subset_size=subset, subsets=50, seed=seed)
    return {"fid": metrics.frechet_distance(real, fake), "kid": kid, "kid_std": kid_std}


def shapes_figures(
    drawn: np.ndarray, kinds: Sequence[synthetic.Kind], drawn_unseen: np.ndarray, unseen: Sequence[synthetic.Kind]
) -> dict[str, float]:
    """Accuracies of colour, shape and background by the pixel checker."""
    seen = pixel_checker.accuracy(list(drawn), kinds)
    composed = pixel_checker.accuracy(list(drawn_unseen), unseen)
    figures = {f"samples.{what}_accuracy": seen[what] for what in ("color", "shape", "background")}
    return figures | {"samples.heldout_color_accuracy": composed["color"]}


def _print(report: EvaluationReport, out: str) -> None:
    table = Table("metric", "value", title=f"Evaluation of {report.samples} drawn pictures")
    for name, value in sorted(report.metrics.items()):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"Report: {out} (feature network: {report.feature_network.name})", flush=True)
