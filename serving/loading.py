"""A release as a replica holds it: loaded through its manifest, tried once, and drawing whole batches."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from latentray.checkpoint import manifest
from latentray.config.serve import ServeConfig
from latentray.errors import ArtifactError, ConfigError, RequestRefused
from latentray.inference.requests import ActionRequest, SamplingRequest
from serving import policies
from serving.messages import ModelInfo, Picture, Plan

logger = logging.getLogger("ray.serve")

KINDS = ("release", "model")
"""Kinds of artifact that can be served."""


class Servable(Protocol):
    """A release as a replica holds it, whatever it makes."""

    @property
    def info(self) -> ModelInfo: ...

    def warm_up(self) -> None: ...

    def draw(self, requests: Sequence[Any]) -> Sequence[Picture | Plan | Exception]: ...


class Model(Protocol):
    """What serving uses of `latentray.inference.sampling.TextToImage`."""

    defaults: Any
    size: int
    downsampling: int
    samplers: tuple[str, ...]
    max_steps: int
    frames: int
    fps: float
    takes_like: bool
    takes_mask: bool
    makes_larger: int
    labels: tuple[int | None, tuple[str, ...]]

    def guide_by(self, classifier: Any) -> None: ...

    def sample(self, requests: Sequence[Any]) -> list[Any]: ...


def read_manifest(uri: str) -> manifest.Manifest:
    """The manifest of a release or model. Raises InputMissing, DigestMismatch, or ArtifactError for another kind."""
    found = manifest.read(uri)
    if found.kind not in KINDS:
        raise ArtifactError(
            f"A {' or a '.join(KINDS)} is wanted here, and this is a {found.kind}.",
            where=uri,
            mend="Promote a model first (python -m jobs.promote), or give its path with release=...",
        )
    return found


def loader_of(import_path: str) -> Callable[..., Model]:
    """The call behind `module:name` or `module:Class.method`."""
    module, _, name = import_path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"The loader cannot be imported: {error}", where="loader", mend="Give module:callable."
        ) from None
    return found


def require_settings(config: ServeConfig, uri: str) -> None:
    """Raise ConfigError for settings that the release has no use for; for a classifier as `classifier_folder.require_fit`."""
    if not policies.is_policy(uri, read_manifest(uri)):
        if config.classifier is not None:
            from latentray.inference import classifier_folder  # here, for the ingress has no torch

            classifier_folder.require_fit(config.classifier, model=uri)
        return
    asked = {"offload": config.offload, "compile": config.compile}
    asked |= {name: getattr(config, name) is not None for name in ("classifier", "text_precision")}
    for where, is_set in asked.items():
        if is_set:
            raise ConfigError(
                "A policy is one small network: it is whole on the device, not compiled, and has neither texts nor classes.",
                where=where,
                mend=f"Leave {where}= out.",
            )


def load(config: ServeConfig, uri: str, release_id: str) -> Servable:
    """Load a release; the loader verifies every file it reads by the manifest."""
    found = read_manifest(uri)
    created = datetime.datetime.fromisoformat(found.created)
    require_settings(config, uri)
    if policies.is_policy(uri, found):
        return policies.load(config, uri, release_id, created=int(created.timestamp()))
    chosen = {} if config.text_precision is None else {"text_precision": config.text_precision}
    model = loader_of(config.loader)(
        uri, device=config.device, offload=config.offload, compile=config.compile, **chosen
    )
    if config.classifier is not None:
        from latentray.inference import classifier_folder

        model.guide_by(classifier_folder.load(config.classifier))
    classes, class_names = model.labels
    info = ModelInfo(
        release_id=release_id,
        release=uri,
        created=int(created.timestamp()),
        size=model.size,
        downsampling=model.downsampling,
        samplers=tuple(model.samplers),
        max_steps=model.max_steps,
        sampler=model.defaults.sampler,
        steps=model.defaults.steps,
        guidance_scale=model.defaults.guidance_scale,
        frames=model.frames,
        fps=model.fps,
        takes_like=model.takes_like,
        classes=classes,
        class_names=tuple(class_names),
        has_classifier=config.classifier is not None,
        makes_larger=model.makes_larger,
        takes_mask=model.takes_mask,
    )
    return Loaded(model=model, info=info, threads=config.threads)


def _no_longer(request: Any, info: ModelInfo) -> RequestRefused | None:
    """Why a request that was admitted before a promotion cannot be drawn by the release that came with it."""
    now = f"The model in service is {info.what} now."
    if isinstance(request, ActionRequest) or bool(request.frames) != bool(info.frames):
        return RequestRefused(now, param="model")
    if (request.small_HWC is not None) != bool(info.makes_larger):
        return RequestRefused(now, param="model")
    if request.small_HWC is not None:
        height, width = (side * info.makes_larger for side in request.small_HWC.shape[:2])
        if (height, width) != (request.height, request.width):
            return RequestRefused(now, param="image")
    if request.sampler not in info.samplers:
        allowed = f"This model allows: {', '.join(info.samplers)}."
        return RequestRefused(f"Unknown sampler {request.sampler!r}. {allowed}", param="sampler")
    if request.label is not None and request.label >= (info.classes or 0):
        return RequestRefused(f"There is no class {request.label}. {now}", param="label")
    if request.like_HWC is not None and not info.takes_like:
        return RequestRefused(f"It draws no variations of pictures. {now}", param="like")
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model and what is said about it."""

    model: Model
    info: ModelInfo
    threads: int | None

    def warm_up(self) -> None:
        """Draw one picture in few steps, in the thread that will draw: a release that cannot never serves."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        size, info = self.info.size, self.info
        small = size // (info.makes_larger or 1)
        request = SamplingRequest(
            prompt="warm-up",
            steps=min(2, info.steps, info.max_steps),
            guidance_scale=info.guidance_scale,
            seed=0,
            sampler=info.sampler,
            height=size,
            width=size,
            frames=info.frames,
            label=0 if info.has_classifier else None,
            classifier_scale=1.0 if info.has_classifier else 0.0,
            small_HWC=np.full((small, small, 3), 127, np.uint8) if info.makes_larger else None,
        )
        (outcome,) = self.draw([request])
        if isinstance(outcome, Exception):
            raise outcome

    def draw(self, requests: Sequence[SamplingRequest]) -> list[Picture | Exception]:
        """One outcome per request, in order; requests of one size and number of frames are drawn in one call.

        Where a call fails, its pictures are tried one by one, so that a request fails for its own faults only.
        """
        groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        outcomes: list[Picture | Exception] = [RequestRefused("not drawn", status=500)] * len(requests)
        for i, request in enumerate(requests):
            refusal = _no_longer(request, self.info)
            if refusal is None:
                groups[request.height, request.width, request.frames].append(i)
            else:
                outcomes[i] = refusal
        for rows in groups.values():
            for i, outcome in zip(rows, self._draw_group([requests[i] for i in rows]), strict=True):
                outcomes[i] = outcome
        return outcomes

    def _draw_group(self, requests: list[SamplingRequest]) -> list[Picture | Exception]:
        try:
            drawn = self.model.sample(requests)
        except Exception as error:
            if len(requests) == 1:
                logger.exception("a picture could not be drawn")
                return [error]
            return [outcome for request in requests for outcome in self._draw_group([request])]
        release_id = self.info.release_id
        return [Picture(pixels_HWC=p.pixels_HWC, truncated=p.truncated, release_id=release_id) for p in drawn]
