"""The model card of a release: README.md with the YAML front matter that model hubs read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from latentray.checkpoint.manifest import Manifest
from latentray.registry.report import EvaluationReport, direction


def render(
    *, release: str, model: Manifest, settings: Mapping[str, Any], report: EvaluationReport, license: str = "other"
) -> str:
    """The card's text. `settings` is the model's config.json. A pure function: equal releases have equal cards."""
    front = {
        "license": license,
        "pipeline_tag": "text-to-image",
        "library_name": "latentray",
        "tags": ["latent-diffusion", "text-to-image", "diffusion"],
    }
    if license == "other":
        front["license_name"] = "unspecified"
    size = settings.get("size")
    native = f" It draws {size}x{size} pixels." if size else ""
    sampler, network = report.sampler, report.feature_network
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# latentray release {release}",
        f"A text-to-image latent diffusion model, trained and promoted with latentray.{native} "
        "The weights are an exponential moving average (EMA) of the training weights, as safetensors.",
        "## Figures",
        _figures(report),
        f"Measured on {report.samples} pictures drawn with seed {report.seed}, sampler `{sampler.sampler}`, "
        f"{sampler.steps} steps, guidance scale {sampler.guidance_scale:g}. FID, KID and rFID use the features of "
        f"`{network.name}` (weights `{network.digest[:12]}`, resize: {network.resize}); they can be compared only with "
        "figures of the same network, data set, resize and number of pictures.",
        "## Lineage",
        _lineage(model, report),
        "## Intended use",
        "Drawing pictures of the kind it was trained on, from captions worded like those of its training data: by "
        "latentray's endpoint, or in Python with `latentray.inference.sampling.TextToImage.load(<this folder>)`.",
        "## Limits",
        "- It knows only what its training data shows, with that data's gaps and biases; captions in another style or "
        "language are not understood.\n"
        "- The autoencoder is the ceiling of detail: what it cannot reconstruct cannot be drawn.\n"
        "- Sizes far from the training size repeat objects; high guidance scales oversaturate.\n"
        "- Nothing filters prompts or pictures; add a filter before showing pictures to the public.",
    ]
    return "\n\n".join(sections) + "\n"


def _figures(report: EvaluationReport) -> str:
    rows = ["| metric | value | better |", "|---|---|---|"]
    for name, value in sorted(report.metrics.items()):
        shown = f"{value:.4g}" if math.isfinite(value) else "not a number"
        rows.append(f"| `{name}` | {shown} | {direction(name)} |")
    return "\n".join(rows)


def _lineage(model: Manifest, report: EvaluationReport) -> str:
    digests = {**model.inputs, "model": model.digest, "report": report.digest, "evaluated on": report.dataset}
    rows = [
        "| artifact | digest (sha256) |",
        "|---|---|",
        *(f"| {role} | `{digest}` |" for role, digest in digests.items()),
    ]
    if model.git_commit:
        rows.append(f"\nTrained at git commit `{model.git_commit}`.")
    return "\n".join(rows)
