"""The two Ray Serve deployments: `Ingress` (HTTP, no torch) and `Sampler` (a release, drawing in batches)."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from latentray.config.serve import ServeConfig
from latentray.errors import RequestRefused
from latentray.inference.requests import ActionRequest, SamplingRequest
from serving import api
from serving.loading import Servable, load
from serving.messages import ModelInfo, Picture, Plan

logger = logging.getLogger("ray.serve")

INFO_FRESH_S = 2.0
"""Seconds for which the ingress trusts what it knows of the model; a promotion shows after at most so long."""
RENEW_S = 0.5
"""Seconds a request waits for the sampler to renew it, once per INFO_FRESH_S; a busy sampler does not hold it up."""
PROBE_S = 5.0
"""Seconds a readiness probe waits for the sampler."""
HUNG = 2.0
"""A sampling call that takes so many times `request_timeout_s` hangs."""
BUSY_S = 30.0
"""A sampler that answered within so many seconds is ready, though too busy now to answer a probe."""


class Sampler:
    """One replica: holds a release and draws the pictures of many requests in one call.

    `reconfigure` takes `{"release": uri, "release_id": id}`: a promotion is a change of `user_config`, which Serve
    applies in place; the old release draws on until the new one is loaded, verified and has drawn a picture.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._loaded: Servable | None = None
        self._refused: tuple[str, str] | None = None
        self._drawing_since = float("inf")
        # One thread: it keeps the event loop free for health checks, and torch calls never overlap.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._draw_one.set_max_batch_size(config.max_batch_size)
        self._draw_one.set_batch_wait_timeout_s(config.batch_wait_timeout_s)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load a release and swap it in.

        Where it is damaged or cannot draw, the first one raises, and Serve reports the failure. A later one is noted in
        `info` and the one in place goes on: raising would make Serve stop this replica, and the last replica with it.
        """
        uri, release_id = user_config["release"], user_config["release_id"]
        self._refused = None
        if self._loaded is not None and self._loaded.info.release_id == release_id:
            return
        loop = asyncio.get_running_loop()
        try:
            # not in the thread where pictures are drawn: the release in place works on
            loaded = await loop.run_in_executor(None, load, self._config, uri, release_id)
            await loop.run_in_executor(self._thread, loaded.warm_up)
        except Exception as error:
            if self._loaded is None:
                raise
            logger.exception("release %s cannot be served; %s stays", release_id, self._loaded.info.release_id)
            self._refused = (release_id, str(error))
            return
        self._loaded = loaded
        logger.info("serving release %s from %s", release_id, uri)

    def check_health(self) -> None:
        """Raises where a call hangs (nobody waits for its pictures any more): Serve then replaces the replica."""
        if time.monotonic() - self._drawing_since > HUNG * self._config.request_timeout_s:
            raise RuntimeError("a sampling call hangs")

    async def info(self) -> ModelInfo:
        """What the loaded release is and allows."""
        return dataclasses.replace(self._model().info, refused=self._refused)

    async def draw(self, requests: list[Any]) -> list[Any]:
        """The pictures, or the plan, of one HTTP request; they may share batches with those of others."""
        outcomes = await asyncio.gather(*(self._draw_one(request) for request in requests))
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.02)  # both set again by __init__
    async def _draw_one(self, requests: list[SamplingRequest | ActionRequest]) -> Sequence[Picture | Plan | Exception]:
        loaded = self._model()
        self._drawing_since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: loaded.draw(requests))
        finally:
            self._drawing_since = float("inf")

    def _model(self) -> Servable:
        if self._loaded is None:
            raise RequestRefused("No model is loaded yet.", code="model_not_ready", status=503)
        return self._loaded


class HandleBackend:
    """The ingress's view of the samplers: bounded waits, and Ray's errors turned into HTTP statuses."""

    def __init__(self, handle: DeploymentHandle, *, request_timeout_s: float) -> None:
        self._handle, self._timeout_s = handle, request_timeout_s
        self._info: ModelInfo | None = None
        self._asked = self._answered = float("-inf")

    async def info(self) -> ModelInfo:
        """The model's bounds; where the sampler is too busy to renew a known answer, the known one."""
        if self._info is None:
            return await self._fetch_info(self._timeout_s)
        if time.monotonic() - self._asked > INFO_FRESH_S:
            try:
                return await self._fetch_info(RENEW_S)
            except RequestRefused:
                logger.debug("the sampler is busy; its known bounds are used")
        return self._info

    async def draw(self, requests: Sequence[Any]) -> list[Any]:
        return await self._call("draw", self._timeout_s, list(requests))

    async def ready(self) -> bool:
        """A probe answered, or the sampler is busy and answered a short while ago."""
        try:
            await self._fetch_info(PROBE_S)
        except RequestRefused as refusal:
            # a full queue, or no answer in time: it works, if it did lately
            return refusal.status in (429, 504) and time.monotonic() - self._answered < BUSY_S
        except Exception:
            logger.warning("the sampler does not answer", exc_info=True)
            return False
        return True

    async def _fetch_info(self, timeout_s: float) -> ModelInfo:
        self._asked = time.monotonic()
        self._info = await self._call("info", timeout_s)
        return self._info

    async def _call(self, method: str, timeout_s: float, *args: Any) -> Any:
        response = getattr(self._handle, method).remote(*args)
        try:
            answer = await asyncio.wait_for(_answer(response), timeout_s)
        except TimeoutError:
            response.cancel()
            raise RequestRefused(f"No answer within {timeout_s:g} s.", code="timeout", status=504) from None
        except BackPressureError:
            raise RequestRefused("Too many requests are waiting; try again.", code="queue_full", status=429) from None
        except DeploymentUnavailableError:
            raise RequestRefused("The model is not available.", code="model_not_ready", status=503) from None
        except RayTaskError as error:
            if isinstance(error.cause, RequestRefused):
                raise error.cause from None
            raise
        except RayActorError:
            raise RequestRefused("The sampler was lost; try again.", code="sampler_lost", status=503) from None
        self._answered = time.monotonic()
        return answer


async def _answer(response: Any) -> Any:
    return await response


@serve.ingress()
class Ingress:
    """Validation, keys and encoding; its ASGI app is made in the replica, from the config."""

    def __init__(self, config: ServeConfig, key_hashes: list[str], sampler: DeploymentHandle) -> None:
        self._config, self._key_hashes = config, key_hashes
        self._backend = HandleBackend(sampler, request_timeout_s=config.request_timeout_s)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return api.create(self._config, self._backend, key_hashes=self._key_hashes)
