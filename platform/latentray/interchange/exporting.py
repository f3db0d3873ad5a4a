"""The job that hands a model out in a layout that other tools load, with a card for the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from latentray.checkpoint import manifest, store
from latentray.checkpoint.manifest import Manifest
from latentray.config import compose
from latentray.config.export import Export
from latentray.interchange import diffusers_folders, model_folders, resolving, single_file
from latentray.interchange.layouts import Pipeline
from latentray.registry import card, report, versions
from latentray.registry.card import Handout

_FAMILIES = {
    "sd": "stable-diffusion",
    "sdxl": "stable-diffusion-xl",
    "sdxl_refiner": "stable-diffusion-xl",
    "sd3": "stable-diffusion-3",
}
"""The hub's tags."""


def export(config: Export) -> str:
    """Write a model or release in diffusers' layout or as a single file, with its card; return the URI.

    Raises ConfigError naming the setting that the other layout has no words for, DigestMismatch for a damaged model,
    AlreadyExists where `out` holds an artifact; nothing is written then.
    """
    assert config.model is not None and config.out is not None
    out = store.absolute(config.out)
    manifest.refuse_existing(out)
    if config.registry:
        uri = versions.resolve(config.registry, config.model)[1]
    else:
        uri = store.absolute(resolving.artifact(config.model, "model", setting="model"))
    with store.staging() as scratch:
        (scratch / "read").mkdir()
        found, pipeline, defaults = model_folders.read(uri, scratch / "read")
        store.require_space(out, 2 * pipeline.bytes)
        folder = scratch / "written"
        folder.mkdir()
        if config.to == "diffusers":
            name = diffusers_folders.write(pipeline, folder, sampler=config.sampler or defaults.sampler)
        else:
            name = pipeline.layout.pipeline
            single_file.write(pipeline, folder / f"{out.rsplit('/', 1)[-1]}.safetensors")
        (folder / versions.CARD).write_text(_card(config, uri, found, pipeline, name))
        made = manifest.publish(
            folder,
            out,
            kind=config.to,
            inputs={**found.inputs, found.kind: found.digest},
            config=compose.to_dict(config),
            meta={"pipeline": name, **found.meta},
        )
    print(f"{name}, {len(made.files)} files, {sum(one.size for one in made.files.values()) / 2**20:.0f} MiB: {out}")
    if config.to == "diffusers":
        print(f'next: diffusers.DiffusionPipeline.from_pretrained("{out}")', flush=True)
    return out


def to_diffusers(model: str, out: str) -> str:
    """Write the model or release at one URI as a folder that `diffusers.DiffusionPipeline.from_pretrained` loads."""
    return export(Export(model=model, to="diffusers", out=out))


def _card(config: Export, uri: str, found: Manifest, pipeline: Pipeline, name: str) -> str:
    settings = json.loads(manifest.fetch_file(uri, "config.json", found).read_text())
    figures = None
    if report.NAME in found.files:
        path = manifest.fetch_file(uri, report.NAME, found)
        figures = report.EvaluationReport.from_json(json.loads(path.read_bytes()), where=store.join(uri, report.NAME))
    handout = Handout(
        pipeline=name,
        family=_FAMILIES[pipeline.layout.name],
        task="image-to-image" if pipeline.layout.name == "sdxl_refiner" else "text-to-image",
        base_model=config.base_model or found.meta.get("base_model"),
        prompts=tuple(config.prompts),
    )
    own = _front_of(manifest.fetch_file(uri, versions.CARD, found)) if versions.CARD in found.files else {}
    return card.render(
        release=uri.rsplit("/", 1)[-1] if figures else str(found.meta.get("run") or uri.rsplit("/", 1)[-1]),
        model=found,
        settings=settings,
        report=figures,
        license=config.license or str(own.get("license", card.OTHER_LICENSE)),
        handout=handout,
    )


def _front_of(path: Path) -> dict[str, Any]:
    """The metadata of a card."""
    parts = path.read_text().split("---\n", 2)
    return yaml.safe_load(parts[1]) if len(parts) == 3 else {}
