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
    pipeline = read(config, path)
    defaults = defaults_of(config, pipeline)
    meta = {"imported_from": config.weights, "layout": pipeline.layout.name} | on_hub(config.weights, path)
    made = model_folders.write(pipeline, out, defaults=defaults, config=compose.to_dict(config), meta=meta, parts=parts)
    _tell(pipeline, defaults, out, parts, sum(entry.size for entry in made.files.values()))
    return out


def read(config: ImportWeights, path: Path) -> Pipeline:
    """The pipeline in a local folder or single file. Raises as the readers of both layouts do."""
    if path.is_file():
        pipeline = single_file.from_single_file(
            path,
            described=None if config.yaml is None else Path(config.yaml),
            prediction=config.prediction,
            tokenizer=config.tokenizer,
            ema=config.ema,
        )
    else:
        pipeline = diffusers_folders.read(path, variant=config.variant, where=config.weights or str(path))
    pipeline.size = _size(config.size or pipeline.size, pipeline)
    return pipeline


def _size(size: int, pipeline: Pipeline) -> int:
    """A model's native height and width. Raises ConfigError where the autoencoder does not divide it."""
    factor = pipeline.autoencoder.downsampling
    if size % factor:
        raise ConfigError(
            f"Pictures of {size} pixels do not divide by the autoencoder's factor {factor}.",
            where="size",
            mend=f"Choose a multiple of {factor}.",
        )
    return size


def on_hub(source: str, path: Path) -> dict[str, Any]:
    """What lineage says of weights from the hub: the repository, and the commit that `path` is of; nothing of others."""
    if not hub.is_id(source):
        return {}
    commit = hub.commit_of(path)
    return {"base_model": hub.repository(source)} | ({"base_commit": commit} if commit else {})


def defaults_of(config: ImportWeights, pipeline: Pipeline) -> SamplingDefaults:
    """What a request gets where it says nothing. Raises ConfigError for a sampler that does not apply."""
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
