"""A release as a replica holds it: loaded through its manifest, tried once, and drawing whole batches."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
    classes: int | None
    class_names: tuple[str, ...]

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


def load(config: ServeConfig, uri: str, release_id: str) -> Servable:
    """Load a release; the loader verifies every file it reads by the manifest."""
    found = read_manifest(uri)
    created = datetime.datetime.fromisoformat(found.created)
    if policies.is_policy(uri, found):
        return policies.load(config, uri, release_id, created=int(created.timestamp()))
    model = loader_of(config.loader)(uri, device=config.device)
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
        classes=model.classes,
        class_names=tuple(model.class_names),
    )
    return Loaded(model=model, info=info, threads=config.threads)


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
        request = SamplingRequest(
            prompt="warm-up",
            steps=min(2, info.steps, info.max_steps),
            guidance_scale=info.guidance_scale,
            seed=0,
            sampler=info.sampler,
            height=size,
            width=size,
            frames=info.frames,
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
            if isinstance(request, ActionRequest):  # likewise
                outcomes[i] = RequestRefused("The model draws pictures now.", param="model")
            elif request.sampler not in self.info.samplers:  # admitted before a promotion that changed the objective
                outcomes[i] = RequestRefused(
                    f"Unknown sampler {request.sampler!r}. This model allows: {', '.join(self.info.samplers)}.",
                    param="sampler",
                )
            elif bool(request.frames) != bool(self.info.frames):  # likewise
                outcomes[i] = RequestRefused(
                    f"The model draws {'clips' if self.info.frames else 'pictures'} now.", param="model"
                )
            elif request.label is not None and request.label >= (self.info.classes or 0):  # likewise
                outcomes[i] = RequestRefused(f"The model knows no class {request.label} now.", param="label")
            elif request.like_HWC is not None and not self.info.takes_like:  # likewise
                outcomes[i] = RequestRefused("The model draws no variations of pictures now.", param="like")
            else:
                groups[request.height, request.width, request.frames].append(i)
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
