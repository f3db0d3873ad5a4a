"""The job that makes a model folder from others' weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.import_weights import ImportWeights
from latentray.diffusion import samplers, schedules, spacing
from latentray.errors import ConfigError
from latentray.inference.model_folder import SamplingDefaults
from latentray.interchange import diffusers_folders, folders, hub, model_folders, single_file
from latentray.interchange.layouts import Pipeline


def import_weights(config: ImportWeights) -> str:
    """Read, check and commit the model; return its URI. Nothing is written before all of it was checked."""
    assert config.weights is not None and config.out is not None
    out, parts = store.absolute(config.out), None if config.parts is None else store.absolute(config.parts)
    manifest.refuse_existing(out)
    path = folders.local(config.weights, variant=config.variant)
    if path.is_file():
        pipeline = single_file.from_single_file(
            path,
            described=None if config.yaml is None else Path(config.yaml),
            prediction=config.prediction,
            tokenizer=config.tokenizer,
            ema=config.ema,
        )
    else:
        pipeline = diffusers_folders.read(path, variant=config.variant, where=config.weights)
    pipeline.size = config.size or pipeline.size
    defaults = _defaults(config, pipeline)
    meta: dict[str, Any] = {"imported_from": config.weights, "layout": pipeline.layout.name}
    if hub.is_id(config.weights):
        meta["base_model"] = "/".join(config.weights.partition("@")[0].split("/")[:2])
    made = model_folders.write(pipeline, out, defaults=defaults, config=compose.to_dict(config), meta=meta, parts=parts)
    _tell(pipeline, defaults, out, parts, sum(entry.size for entry in made.files.values()))
    return out


def _defaults(config: ImportWeights, pipeline: Pipeline) -> SamplingDefaults:
    schedule, solver = schedules.build(pipeline.objective), pipeline.solver
    known = samplers.names(schedule)
    sampler = config.sampler or (solver.sampler if solver.sampler in known else known[0])
    if sampler not in known:
        raise ConfigError(
            f"Sampler {sampler!r} does not apply to this model.",
            where="sampler",
            mend=f"Use one of {', '.join(known)}.",
        )
    guidance = pipeline.layout.guidance_scale if config.guidance_scale is None else config.guidance_scale
    return SamplingDefaults(
        sampler=sampler,
        steps=config.steps or pipeline.layout.steps,
        guidance_scale=guidance,
        spacing=solver.spacing if solver.spacing in spacing.names(schedule) else None,
    )


def _tell(pipeline: Pipeline, defaults: SamplingDefaults, out: str, parts: str | None, size: int) -> None:
    objective = pipeline.objective
    print(
        f"{pipeline.layout.pipeline}: predicts {objective.prediction} on schedule {objective.schedule}, "
        f"{pipeline.size}x{pipeline.size} pixels, {size / 2**20:.0f} MiB: {out}"
    )
    if pipeline.solver.stands_in_for:
        print(f"its {pipeline.solver.stands_in_for} is no sampler here; {defaults.sampler} takes its place")
    if parts is not None:
        print(f"to train on: autoencoder_from={store.join(parts, 'autoencoder')} denoiser_from={out}")
    print(f"next: python -m jobs.sample release={out} prompt='...'", flush=True)
