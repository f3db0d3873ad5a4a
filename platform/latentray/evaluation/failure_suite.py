"""`python -m jobs.evaluate suite=failures`: the four known failures of a model, each beside its remedy, in one picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.evaluate import Evaluate
from latentray.data.shards import IndexedShards
from latentray.diffusion import schedules
from latentray.diffusion.schedules import RectifiedFlow
from latentray.errors import ConfigError
from latentray.evaluation import autoencoders, failures, feature_networks, metrics
from latentray.inference.sampling import SamplingRequest, TextToImage
from latentray.models import perceptual as lpips
from latentray.randomness import Purpose, mix
from latentray.reporting import panels
from latentray.reporting.progress import Progress

GUIDANCE = (1.0, 2.0, 4.0, 7.0, 10.0, 15.0)
SIZES = (1.0, 1.5, 2.0, 3.0)
"""Multiples of the trained size."""
RESCALE = 0.7
MEAN, SPREAD, PIXELS = 0.3, 0.5, 4096
"""Pictures of constant brightness, in the network's units: somewhat brighter than gray, of both kinds."""
_OUT = "failures"


def evaluate(config: Evaluate) -> str:
    """Measure the failures, write `failures.json` and `failures.png` as an artifact, and return its URI.

    Raises as `suite.evaluate`.
    """
    model_uri, data = store.absolute(config.model or ""), store.absolute(config.data or "")
    out = store.absolute(config.out) if config.out else store.join(model_uri.rsplit("/", 1)[0], _OUT)
    listing = manifest.read(model_uri)
    training, validation = (IndexedShards.open(store.join(data, split)) for split in ("train", "validation"))
    validation.verify()
    model = TextToImage.load(model_uri, device=config.device)
    captions = autoencoders.load_captions(validation, limit=config.samples)
    figures: dict[str, Any] = {"contrast": contrast()}
    base = _base_request(config, model)
    total = len(captions) * (2 * len(GUIDANCE) + len(SIZES) * (2 if isinstance(model.schedule, RectifiedFlow) else 1))
    with Progress(total, "drawing") as progress:
        drawer = _Drawer(model, config, captions, progress)
        figures["saturation"] = saturation(drawer, base)
        figures["repetition"] = repetition(drawer, base)
    originals = autoencoders.load_pictures(validation, model.size, limit=config.heldout_samples)
    network = feature_networks.of_dataset(
        store.join(data, "feature_network"), training, model.size, inception_weights=config.inception
    )
    figures["ceiling"] = ceiling(model, originals, network, config.lpips_weights)
    charts = [
        panels.Panel(
            title="Muted contrast: brightness of constant pictures",
            x_label="schedule",
            y_label="spread of the sampled mean",
            bars={name: {k: v for k, v in row.items() if k != "mean"} for name, row in figures["contrast"].items()},
        ),
        panels.Panel(
            title="Oversaturation",
            x_label="guidance scale",
            y_label="saturated channel values",
            lines={name: list(zip(GUIDANCE, ys, strict=True)) for name, ys in figures["saturation"].items()},
        ),
        panels.Panel(
            title="Repeated objects",
            x_label=f"size, in multiples of the trained {model.size}",
            y_label="pictures with not one object",
            lines={name: list(zip(SIZES, ys, strict=True)) for name, ys in figures["repetition"].items()},
        ),
        panels.Panel(
            title=_ceiling_title(figures["ceiling"]),
            x_label="share of validation pictures",
            y_label="PSNR of the reconstruction, dB",
            lines={"autoencoder": _quantiles(figures["ceiling"].pop("psnr_of_pictures"))},
        ),
    ]
    with store.staging() as folder:
        (folder / "failures.json").write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
        panels.save(charts, folder / "failures.png")
        inputs = {"model": listing.digest, "dataset": validation.manifest.digest}
        manifest.publish(folder, out, kind="failures", inputs=inputs, config=compose.to_dict(config), replace=True)
    _print(figures)
    print(f"Picture: {store.join(out, 'failures.png')}", flush=True)
    return out


def contrast() -> dict[str, dict[str, float]]:
    """Spread of the sampled brightness, analytic and by the sampler, for each discrete schedule with and without remedy."""
    rows: dict[str, dict[str, float]] = {}
    for name, schedule in (("scaled linear", schedules.scaled_linear(1000)), ("linear", schedules.linear(1000))):
        for label, one in ((name, schedule), (f"{name}, zero SNR", schedules.zero_terminal_snr(schedule))):
            wanted = failures.contrast_in_closed_form(one, mean=MEAN, spread=SPREAD, pixels=PIXELS)
            got = failures.contrast_measured(one, mean=MEAN, spread=SPREAD, pixels=PIXELS, sampler="unipc")
            rows[label] = {"analytic": wanted.spread, "sampled": got.spread, "mean": got.mean}
    return rows


def saturation(drawer: _Drawer, base: SamplingRequest) -> dict[str, list[float]]:
    """Saturated share against guidance, plain and with rescaled guidance."""
    return {
        label: [
            failures.saturated_share(
                drawer(dataclasses.replace(base, guidance_scale=scale, guidance_rescale=share)),
            )
            for scale in GUIDANCE
        ]
        for label, share in (("plain", 0.0), (f"rescale {RESCALE:g}", RESCALE))
    }


def repetition(drawer: _Drawer, base: SamplingRequest) -> dict[str, list[float]]:
    """Share of pictures with more or fewer than one object against size; for rectified flow also with the shift."""
    remedies = {"plain": False}
    if isinstance(drawer.model.schedule, RectifiedFlow):
        remedies["resolution shift"] = True
    unit = drawer.model.downsampling

    def at(multiple: float, shifted: bool) -> np.ndarray:
        side = max(round(base.height * multiple / unit), 1) * unit
        return drawer(dataclasses.replace(base, height=side, width=side, resolution_shift=shifted))

    return {
        label: [failures.repeated_share(at(multiple, shifted)) for multiple in SIZES]
        for label, shifted in remedies.items()
    }


def ceiling(
    model: TextToImage,
    originals: np.ndarray,
    network: feature_networks.FeatureNetwork,
    lpips_weights: str | None = None,
) -> dict[str, Any]:
    """The autoencoder's card, and the PSNR of each picture. Without weights LPIPS has a random backbone, and says so."""
    net = model.autoencoder.float()
    perceptual = lpips.load("alex", weights=lpips_weights, random_backbone=lpips_weights is None).to(model.device)
    card, rebuilt = autoencoders.measure(net, originals, perceptual=perceptual, network=network, device=model.device)
    model.autoencoder.to(model.dtype)
    card["lpips_backbone"] = lpips_weights or "random"
    as_unit = [torch.from_numpy(x).permute(0, 3, 1, 2).double() / 255 for x in (originals, rebuilt)]
    return dict(card) | {"psnr_of_pictures": metrics.psnr(*as_unit).tolist()}


class _Drawer:
    """Draws the captions under changed settings; picture i has the same seed under all of them."""

    def __init__(self, model: TextToImage, config: Evaluate, captions: Sequence[str], progress: Progress) -> None:
        self.model, self.config, self.captions, self.progress = model, config, captions, progress
        self.drawn = 0

    def __call__(self, request: SamplingRequest) -> np.ndarray:
        """uint8 (N, H, W, 3)."""
        requests = [
            dataclasses.replace(request, prompt=caption, seed=mix(self.config.seed, Purpose.DRAWING, i) >> 1)
            for i, caption in enumerate(self.captions)
        ]
        out = []
        for i in range(0, len(requests), self.config.batch_size):
            out += [one.pixels_HWC for one in self.model.sample(requests[i : i + self.config.batch_size])]
        self.drawn += len(out)
        self.progress.update(self.drawn)
        return np.stack(out)


def _base_request(config: Evaluate, model: TextToImage) -> SamplingRequest:
    defaults = model.defaults
    request = SamplingRequest(
        prompt="",
        steps=defaults.steps if config.steps is None else config.steps,
        guidance_scale=defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        seed=0,
        sampler=config.sampler or defaults.sampler,
        height=model.size,
        width=model.size,
    )
    model.check(request)
    if config.samples < 2:
        raise ConfigError("Shares want pictures to be shares of.", where="samples", mend="Raise samples.")
    return request


def _quantiles(values: Sequence[float]) -> list[tuple[float, float]]:
    ordered = sorted(values)
    return [((i + 0.5) / len(ordered), value) for i, value in enumerate(ordered)]


def _ceiling_title(card: dict[str, Any]) -> str:
    shown = [f"PSNR {card['psnr']:.1f} dB", f"SSIM {card['ssim']:.2f}"]
    if "rfid" in card:
        shown.append(f"rFID {card['rfid']:.2f}")
    return "The autoencoder's ceiling: " + ", ".join(shown)


def _print(figures: dict[str, Any]) -> None:
    table = Table("failure", "setting", "figures", title="Known failures, and their remedies")
    for label, row in figures["contrast"].items():
        table.add_row("muted contrast", label, f"spread {row['sampled']:.4f} (analytic {row['analytic']:.4f})")
    for what, xs in (("saturation", GUIDANCE), ("repetition", SIZES)):
        for label, values in figures[what].items():
            shown = "  ".join(f"{x:g}: {value:.3f}" for x, value in zip(xs, values, strict=True))
            table.add_row(what, label, shown)
    card = {name: value for name, value in figures["ceiling"].items() if isinstance(value, float)}
    table.add_row("ceiling", "autoencoder", "  ".join(f"{name} {value:.3f}" for name, value in sorted(card.items())))
    Console().print(table)
