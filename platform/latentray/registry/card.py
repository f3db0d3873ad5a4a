"""The model card of a release: README.md with the YAML front matter that model hubs read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import yaml

from latentray.checkpoint.manifest import Manifest
from latentray.registry import policy_card
from latentray.registry.report import EvaluationReport, direction

OTHER_LICENSE = "other"
"""The hub's word for a licence that is none of its list."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Handout:
    """What a card says of a model that is handed out in another library's layout."""

    pipeline: str
    """diffusers' class that reads the folder."""
    family: str
    """The hub's tag of its kind: stable-diffusion, stable-diffusion-xl, stable-diffusion-3 ..."""
    task: str = "text-to-image"
    """The hub's pipeline_tag."""
    base_model: str | None = None
    """Hub id of the model it was trained on from."""
    prompts: tuple[str, ...] = ()
    """What the hub's page offers to draw."""


def render(
    *,
    release: str,
    model: Manifest,
    settings: Mapping[str, Any],
    report: EvaluationReport | None,
    license: str = OTHER_LICENSE,
    handout: Handout | None = None,
) -> str:
    """The card's text. A pure function: equal releases have equal cards.

    Args:
        release: its id, or the name of a model that is none.
        settings: the model's config.json.
        report: None for a model that was not evaluated.
        handout: None for latentray's own layout.
    """
    if "policy" in settings and report is not None:
        return _of_policy(release=release, model=model, settings=settings, report=report, license=license)
    size = settings.get("size")
    native = f" It draws {size}x{size} pixels." if size else ""
    made = "trained and promoted with latentray" if report is not None else "handed out by latentray"
    sections = [
        f"---\n{yaml.safe_dump(_front(license, handout), sort_keys=False)}---",
        f"# latentray {'release' if report is not None else 'model'} {release}",
        f"A text-to-image latent diffusion model, {made}.{native} "
        "The weights are an exponential moving average (EMA) of the training weights, as safetensors.",
        "## Figures",
        _measured(report) if report is not None else "It was not evaluated by latentray.",
        "## Lineage",
        _lineage(model, report),
        "## Intended use",
        _use(settings, handout),
        "## Limits",
        "- It knows only what its training data shows, with that data's gaps and biases; captions in another style or "
        "language are not understood.\n"
        "- The autoencoder is the ceiling of detail: what it cannot reconstruct cannot be drawn.\n"
        "- Sizes far from the training size repeat objects; high guidance scales oversaturate.\n"
        "- Nothing filters prompts or pictures; add a filter before showing pictures to the public.",
    ]
    return "\n\n".join(sections) + "\n"


def _of_policy(
    *, release: str, model: Manifest, settings: Mapping[str, Any], report: EvaluationReport, license: str
) -> str:
    front = policy_card.front(license) | ({"license_name": "unspecified"} if license == OTHER_LICENSE else {})
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# latentray release {release}",
        policy_card.about(settings),
        "## Figures",
        f"{_figures(report)}\n\n{policy_card.measured(report)}",
        "## Lineage",
        _lineage(model, report),
        "## Intended use",
        policy_card.USE,
        "## Limits",
        policy_card.LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def _front(license: str, handout: Handout | None) -> dict[str, Any]:
    """The metadata, in the hub's words."""
    front: dict[str, Any] = {
        "license": license,
        "pipeline_tag": handout.task if handout else "text-to-image",
        "library_name": "diffusers" if handout else "latentray",
        "tags": ["latent-diffusion", "text-to-image", "diffusion"],
    }
    if license == OTHER_LICENSE:
        front["license_name"] = "unspecified"
    if handout is None:
        return front
    front["tags"] += [tag for tag in (handout.family, "latentray", "safetensors") if tag not in front["tags"]]
    if handout.base_model:
        front["base_model"] = handout.base_model
    if handout.prompts:
        front["widget"] = [{"text": prompt} for prompt in handout.prompts]
    return front


def _use(settings: Mapping[str, Any], handout: Handout | None) -> str:
    purpose = "Drawing pictures of the kind it was trained on, from captions worded like those of its training data"
    if handout is None:
        return (
            f"{purpose}: by latentray's endpoint, or in Python with "
            "`latentray.inference.sampling.TextToImage.load(<this folder>)`."
        )
    sampling = settings.get("sampling", {})
    more = (
        f", num_inference_steps={sampling['steps']}, guidance_scale={sampling['guidance_scale']:g}" if sampling else ""
    )
    given = "prompt, image=picture" if handout.task == "image-to-image" else "prompt"
    return (
        f"{purpose}:\n\n```python\nfrom diffusers import {handout.pipeline}\n\n"
        f'pipeline = {handout.pipeline}.from_pretrained("<this folder or repository>")\n'
        f"pictures = pipeline({given}{more}).images\n```"
    )


def _measured(report: EvaluationReport) -> str:
    sampler, network = report.sampler, report.feature_network
    return (
        f"{_figures(report)}\n\n"
        f"Measured on {report.samples} pictures drawn with seed {report.seed}, sampler `{sampler.sampler}`, "
        f"{sampler.steps} steps, guidance scale {sampler.guidance_scale:g}. FID, KID and rFID use the features of "
        f"`{network.name}` (weights `{network.digest[:12]}`, resize: {network.resize}); they can be compared only with "
        "figures of the same network, data set, resize and number of pictures."
    )


def _figures(report: EvaluationReport) -> str:
    rows = ["| metric | value | better |", "|---|---|---|"]
    for name, value in sorted(report.metrics.items()):
        shown = f"{value:.4g}" if math.isfinite(value) else "not a number"
        rows.append(f"| `{name}` | {shown} | {direction(name)} |")
    return "\n".join(rows)


def _lineage(model: Manifest, report: EvaluationReport | None) -> str:
    digests = {**model.inputs, "model": model.digest}
    if report is not None:
        digests |= {"report": report.digest, "evaluated on": report.dataset}
    rows = [
        "| artifact | digest (sha256) |",
        "|---|---|",
        *(f"| {role} | `{digest}` |" for role, digest in digests.items()),
    ]
    if model.git_commit:
        rows.append(f"\nTrained at git commit `{model.git_commit}`.")
    return "\n".join(rows)
