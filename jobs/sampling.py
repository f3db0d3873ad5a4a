"""What `python -m jobs.sample` does: requests from its settings, drawn and laid out on one sheet."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from jobs import driving
from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.sample import Sample
from latentray.data import decode
from latentray.errors import ConfigError, InputMissing, SampleRejected
from latentray.inference import classifier_folder, examples, refinement
from latentray.inference.requests import SamplingRequest, label_of
from latentray.inference.sampling import TextToImage
from latentray.interchange import resolving
from latentray.registry import versions
from latentray.reporting import animations, pictures
from latentray.reporting.progress import Progress

Cell = TypeVar("Cell")

_MODELS = {"release": "model", "refiner": "model", "classifier": "classifier"}
"""The settings that name models, and what each has to be."""
_SCALES = {
    "guidance": ("guidance_scale", (1.0, 2.0, 4.0, 7.0, 10.0, 15.0)),
    "classifier": ("classifier_scale", (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)),
}
"""Comparison -> the scale that is compared, and its usual values."""
_STEPS = (2, 4, 8, 12, 20, 40)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sheet:
    """Requests in rows, left to right, and what stands beside and above them."""

    requests: list[SamplingRequest]
    columns: int
    row_labels: list[str] | None = None
    column_labels: list[str] | None = None
    captions: list[str] | None = None
    title: str = ""
    given: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What the pictures were drawn from, by its name: it begins every row."""


def draw(config: Sample) -> str:
    """Draw what the settings ask for and return the path of the sheet: a PNG, of clips an animated file.

    Raises InputMissing for a release, picture or file of prompts that is not there, ConfigError for settings that do not fit
    the model; all before the first step.
    """
    if config.episodes:
        return driving.drive(config, _model_uri(_found(config)))
    prompts = _prompts(config)
    found = _found(config)
    uri = _model_uri(found)
    picture, mask = _pixels(config.picture, "picture"), _pixels(config.mask, "mask")
    small, like = _pixels(config.small, "small"), _pixels(config.like, "like")
    model = _loaded(uri, config)
    refiner = _refiner(found)
    if found.classifier is not None:
        model.guide_by(classifier_folder.load(store.absolute(found.classifier)))
    sheet = plan(config, model, prompts, picture, mask, small, like)
    drawn, warnings = _draw_all(config, model, refiner, sheet.requests)
    first = sheet.requests[0]
    for name, given in (("picture", picture), ("mask", mask)):
        if given is not None and given.shape[:2] != (first.height, first.width):
            warnings.add(f"the {name} was resized and cut to {first.width}x{first.height}; size= sets another")
    for warning in sorted(warnings):
        print(f"warning: {warning}")
    guided = {} if model.guide is None else {"classifier_digest": model.guide.digest}
    about = json.dumps(
        compose.to_dict(config) | {"model": model.model.digest, "prompts": prompts} | guided,
        sort_keys=True,
        ensure_ascii=False,
    )
    if model.frames:
        animated = np.stack([np.asarray(_laid_out(sheet, list(frame))) for frame in zip(*drawn, strict=True)])
        kind = _format_of(config, model)
        path = Path(config.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(animations.encode(animated, kind, fps=model.fps, parameters=about))
    else:
        pictures.save_png(_laid_out(sheet, drawn), config.out, {"parameters": about})
    print(f"{len(drawn)} {'clips' if model.frames else 'pictures'}: {config.out}", flush=True)
    return config.out


def _laid_out(sheet: Sheet, drawn: Sequence[np.ndarray]) -> Image.Image:
    return pictures.grid(
        _rows([*sheet.given.values()], drawn, sheet.columns),
        columns=len(sheet.given) + sheet.columns,
        captions=None if sheet.captions is None else _rows([*sheet.given], sheet.captions, sheet.columns),
        row_labels=sheet.row_labels,
        column_labels=None if sheet.column_labels is None else [*sheet.given, *sheet.column_labels],
        title=sheet.title,
        scale=2 if max(drawn[0].shape) <= 128 else 1,
    )


def _rows(first: Sequence[Cell], rest: Sequence[Cell], columns: int) -> list[Cell]:
    """`rest` in rows of so many, each of which begins with `first`."""
    found: list[Cell] = []
    for i in range(0, len(rest), columns):
        found += [*first, *rest[i : i + columns]]
    return found


def _format_of(config: Sample, model: TextToImage) -> str:
    """The format of `out`. Raises ConfigError where the model's drawings do not fit into it."""
    found = Path(config.out).suffix[1:]
    if found != "png" and not model.frames:
        raise ConfigError("The model draws pictures.", where="out", mend="End it in .png.")
    if found == "mp4" and animations.mp4_encoder() is None:
        raise ConfigError("There is no encoder for MP4 here.", where="out", mend="End it in .webp or .png.")
    return found


def plan(
    config: Sample,
    model: TextToImage,
    prompts: Sequence[str],
    picture: np.ndarray | None,
    mask: np.ndarray | None,
    small: np.ndarray | None = None,
    like: np.ndarray | None = None,
) -> Sheet:
    """The requests of a sheet, every table of theirs built once: what cannot be drawn is refused here."""
    _format_of(config, model)
    if config.refiner is not None and model.frames:
        raise ConfigError("A refiner ends pictures, not clips.", where="refiner", mend="Leave it out.")
    width, height = map(int, config.size.split("x")) if config.size else (model.size, model.size)
    if small is not None and model.makes_larger and not config.size:
        height, width = (side * model.makes_larger for side in small.shape[:2])
    base = SamplingRequest(
        prompt=prompts[0],
        label=None if config.label is None else label_of(config.label, *model.labels),
        negative_prompt=config.negative_prompt,
        steps=model.defaults.steps if config.steps is None else config.steps,
        guidance_scale=model.defaults.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        seed=config.seed,
        sampler=config.sampler or model.defaults.sampler,
        height=height,
        width=width,
        frames=model.frames if config.frames is None else config.frames,
        eta=config.eta,
        order=config.order,
        spacing=config.spacing,
        guidance_rescale=config.guidance_rescale,
        guidance_interval=config.interval,
        classifier_scale=config.pull,
        bound=config.bound,
        quantile=config.quantile,
        resolution_shift=config.resolution_shift,
        picture_HWC=None if picture is None else decode.to_size(picture, height, width),
        mask_HW=None if mask is None else decode.to_size(mask, height, width)[:, :, 0] > 127,
        small_HWC=small,
        like_HWC=like,
        strength=1.0 if picture is None or mask is not None else config.strength,
    )
    seeds = range(config.seed, config.seed + config.n)
    sheet = dataclasses.replace(
        _LAYOUTS[config.compare](config, model, base, prompts, seeds), given=examples.given(base)
    )
    for request in sheet.requests:
        model.check(request)
    return sheet


def _plain(config: Sample, model: TextToImage, base: SamplingRequest, prompts: Sequence[str], seeds: range) -> Sheet:
    requests = [dataclasses.replace(base, prompt=prompt, seed=seed) for prompt in prompts for seed in seeds]
    captions = [r.prompt or ("" if r.label is None else model.name_of(r.label)) for r in requests]
    return Sheet(requests=requests, columns=min(len(seeds), 8), captions=captions)


def _by_sampler(
    config: Sample, model: TextToImage, base: SamplingRequest, prompts: Sequence[str], seeds: range
) -> Sheet:
    requests = [dataclasses.replace(base, sampler=name, seed=seed) for name in model.samplers for seed in seeds]
    labels = [f"seed {seed}" for seed in seeds]
    return Sheet(
        requests=requests,
        columns=len(seeds),
        row_labels=list(model.samplers),
        column_labels=labels,
        title=_title(base, "steps", "guidance_scale"),
    )


def _by_scale(config: Sample, model: TextToImage, base: SamplingRequest, prompts: Sequence[str], seeds: range) -> Sheet:
    field, usual = _SCALES[config.compare]
    values = config.compare_values or usual
    changes: list[dict[str, Any]] = [{"seed": seed, field: g} for seed in seeds for g in values]
    requests = [dataclasses.replace(base, **one) for one in changes]
    return Sheet(
        requests=requests,
        columns=len(values),
        row_labels=[f"seed {seed}" for seed in seeds],
        column_labels=[f"{config.compare} {g:g}" for g in values],
        title=_title(base, "sampler", "steps"),
    )


def _by_steps(config: Sample, model: TextToImage, base: SamplingRequest, prompts: Sequence[str], seeds: range) -> Sheet:
    values = [int(v) for v in config.compare_values] or [s for s in _STEPS if s <= model.max_steps]
    requests = [dataclasses.replace(base, sampler=name, steps=n) for name in model.samplers for n in values]
    return Sheet(
        requests=requests,
        columns=len(values),
        row_labels=list(model.samplers),
        column_labels=[f"{n} steps" for n in values],
        title=_title(base, "seed", "guidance_scale"),
    )


def _title(base: SamplingRequest, *fields: str) -> str:
    """The prompt or the class, and what all pictures of a sheet share."""
    drawn = base.prompt or ("" if base.label is None else f"class {base.label}")
    return ", ".join([drawn, *(f"{field.replace('_', ' ')} {getattr(base, field)}" for field in fields)])


_LAYOUTS = {
    "none": _plain,
    "sampler": _by_sampler,
    "guidance": _by_scale,
    "classifier": _by_scale,
    "steps": _by_steps,
}


def _draw_all(
    config: Sample, model: TextToImage, refiner: TextToImage | None, requests: Sequence[SamplingRequest]
) -> tuple[list[np.ndarray], set[str]]:
    drawn: list[np.ndarray] = []
    warnings: set[str] = set()
    with Progress(len(requests), "drawing") as progress:
        for i in range(0, len(requests), config.batch_size):
            part = requests[i : i + config.batch_size]
            if refiner is not None:
                drawn += list(refiner.decode(refinement.latents(model, refiner, part, at=config.refine_at)))
            else:
                for picture in model.sample(part):
                    drawn.append(picture.pixels_HWC)
                    warnings.update(picture.warnings)
            progress.update(len(drawn))
    if any(model.is_truncated(r.prompt) for r in requests):
        warnings.add("a prompt was longer than the tokens that a text encoder takes")
    return drawn, warnings


def _refiner(config: Sample) -> TextToImage | None:
    if config.refiner is None:
        return None
    return _loaded(store.absolute(config.refiner), config)


def _loaded(uri: str, config: Sample) -> TextToImage:
    return TextToImage.load(
        uri,
        device=config.device,
        offload=config.offload,
        compile=config.compile,
        text_precision=config.text_precision,
    )


def _prompts(config: Sample) -> list[str]:
    if config.prompt is not None:
        return [config.prompt]
    path = Path(config.prompts or "")
    if not path.is_file():
        raise InputMissing("The file of prompts is not there.", where="prompts", mend=f"Check the path {path}.")
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise InputMissing("The file of prompts is empty.", where=str(path), mend="Write one prompt a line.")
    return lines


def _found(config: Sample) -> Sample:
    """The settings with artifacts wherever they name models; with a registry, `release` is a name in it."""
    kinds = {name: kind for name, kind in _MODELS.items() if name != "release" or not config.registry}
    return resolving.resolved(config, kinds)


def _model_uri(config: Sample) -> str:
    if config.registry:
        return versions.resolve(store.absolute(config.registry), config.release or "")[1]
    uri = store.absolute(config.release or "")
    if not store.exists(store.join(uri, manifest.NAME)):
        raise InputMissing(
            "There is no release or model.",
            where=uri,
            mend="Check the path; an alias or a release id wants registry=<where it was promoted to> besides.",
        )
    return uri


def _pixels(path: str | None, where: str) -> np.ndarray | None:
    if path is None:
        return None
    try:
        return decode.decode(Path(path).read_bytes(), where=path)
    except OSError:
        raise InputMissing("The picture is not there.", where=where, mend=f"Check the path {path}.") from None
    except SampleRejected as error:
        raise InputMissing(f"The picture cannot be read: {error.what}", where=where, mend="Give another.") from None
