"""`python -m jobs.evaluate suite=clips`: a model of clips against validation clips, and what the clips of moving shapes show."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.data import clips, decode, members, synthetic_clips
from latentray.data.shards import IndexedShards
from latentray.data.synthetic_clips import Moving
from latentray.errors import ConfigError
from latentray.evaluation import autoencoders, feature_networks, heldout, pixel_checker, suite
from latentray.inference.sampling import TextToImage
from latentray.registry.report import EvaluationReport, FeatureNetworkId, SamplerSettings
from latentray.reporting import animations, pictures

_NO_NETWORK = FeatureNetworkId(name="none", digest="none", resize="none")
_SHOWN = 12


def evaluate(config: Evaluate) -> str:
    """Measure, write the report artifact with a contact sheet and an animated one, and return its URI.

    Raises InputMissing, ArtifactError or DigestMismatch where model or data cannot be used, SampleRejected for clips that are
    too short, ConfigError for a model of pictures, or a sampler that does not fit.
    """
    model_uri, data = store.absolute(config.model or ""), store.absolute(config.data or "")
    out = store.absolute(config.out) if config.out else store.join(model_uri.rsplit("/", 1)[0], "report")
    validation = IndexedShards.open(store.join(data, "validation"))
    validation.verify()
    model = TextToImage.load(model_uri, device=config.device)
    if not model.frames:
        raise ConfigError("The model draws pictures.", where="suite", mend="Use suite=standard.")
    settings = SamplerSettings(
        sampler=config.sampler or model.defaults.sampler,
        steps=model.defaults.steps if config.steps is None else config.steps,
        guidance_scale=model.defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
    )
    originals, captions = load_clips(validation, model, limit=max(config.samples, config.heldout_samples))
    first = slice(config.heldout_samples)
    figures = heldout.loss(model, originals[first], captions[first], seed=config.seed)

    are_shapes = validation.manifest.meta.get("source") == "moving_shapes"
    asked = [moving for moving in _every_moving() for _ in range(config.per_kind)] if are_shapes else []
    wanted = [synthetic_clips.caption(one) for one in asked][: config.samples] or captions[: config.samples]
    drawn = suite.draw(model, wanted, settings, seed=config.seed, batch_size=config.batch_size)
    if are_shapes:
        figures |= shapes_figures(drawn, asked[: len(drawn)])
    network = _NO_NETWORK
    if config.inception is not None:
        inception = feature_networks.inception(config.inception)
        network = FeatureNetworkId(name=inception.name, digest=inception.digest, resize=inception.resize)
        frames = [np.concatenate(list(some)) for some in (originals, drawn)]
        figures |= suite.distribution(inception, frames[0], frames[1], seed=config.seed)
    listing = manifest.read(model_uri)
    report = EvaluationReport(
        model=listing.digest,
        dataset=validation.manifest.digest,
        feature_network=network,
        samples=len(drawn),
        seed=config.seed,
        sampler=settings,
        metrics=figures,
    )
    shown = autoencoders.spread(len(drawn), _SHOWN)
    with store.staging() as folder:
        (folder / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n")
        about = {"sampler": settings.sampler, "steps": str(settings.steps)}
        chosen, texts = [drawn[i] for i in shown], [wanted[i] for i in shown]
        pictures.save_png(pictures.filmstrips(chosen, texts), folder / "samples.png", about)
        sheets = [np.asarray(pictures.grid(frame, columns=6, captions=texts)) for frame in zip(*chosen, strict=True)]
        (folder / "samples.webp").write_bytes(
            animations.encode(np.stack(sheets), "webp", fps=model.fps, parameters=json.dumps(about))
        )
        inputs = {"model": listing.digest, "dataset": validation.manifest.digest}
        manifest.publish(folder, out, kind="report", inputs=inputs, config=compose.to_dict(config), replace=True)
    _print(report, out)
    print(f"Next: python -m jobs.promote model={model_uri} report={out} gates=none")
    return out


def load_clips(shards: IndexedShards, model: TextToImage, *, limit: int) -> tuple[np.ndarray, list[str]]:
    """The beginnings of up to `limit` clips spread over a data set, uint8 (N,T,H,W,3) as the model draws, and their captions."""
    found, captions = [], []
    for x in autoencoders.spread(shards.count, limit):
        one = clips.read_clip(members.decode_sample(shards.read(x)), frames=model.frames, fps=model.fps)
        found.append(np.stack([decode.to_square(frame, model.size) for frame in one.frames_THWC]))
        captions.append(one.captions[0])
    return np.stack(found), captions


def shapes_figures(drawn_NTHWC: np.ndarray, asked: Sequence[Moving]) -> dict[str, float]:
    """Accuracies of colour, shape and background, in the middle frame, and of the direction at the beginning."""
    middle = drawn_NTHWC.shape[1] // 2
    seen = pixel_checker.accuracy(list(drawn_NTHWC[:, middle]), [one.kind for one in asked])
    figures = {f"samples.{what}_accuracy": seen[what] for what in ("color", "shape", "background")}
    directions = [synthetic_clips.motion_of(clip).direction for clip in drawn_NTHWC]
    right = [found == one.direction for found, one in zip(directions, asked, strict=True)]
    return figures | {"samples.direction_accuracy": float(np.mean(right))}


def _every_moving() -> list[Moving]:
    """Each kind of the training set, directions taking turns, so that a part of the list has all of them."""
    count = len(synthetic_clips.SPLITS["train"].kinds)
    return [synthetic_clips.moving_of("train", index) for index in range(count)]


def _print(report: EvaluationReport, out: str) -> None:
    table = Table("metric", "value", title=f"Evaluation of {report.samples} drawn clips")
    for name, value in sorted(report.metrics.items()):
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"Report: {out}", flush=True)
