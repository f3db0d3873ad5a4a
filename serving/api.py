"""The FastAPI application: routes, authentication, encoding. It draws through a `Backend`, so tests need no cluster."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import latentray
from latentray.config.serve import ServeConfig
from latentray.inference.requests import ActionRequest, SamplingRequest
from latentray.reporting import animations
from serving import forms, keys, refusals
from serving.admission import Admitted, Limits, admit, admit_actions, admit_clips, model_known
from serving.edits import admit_edits
from serving.messages import ModelInfo, Picture, Plan
from serving.pictures import encode
from serving.schema import (
    ActionsReply,
    ActionsRequest,
    EditsRequest,
    ErrorReply,
    ImageData,
    ImagesReply,
    ImagesRequest,
    Model,
    ModelList,
    VideosReply,
    VideosRequest,
)

OPEN_ROUTES = frozenset({"/healthz", "/readyz"})
"""The only routes that answer without a key."""
EDIT_FILES = ("image", "mask", "like")
"""Fields of an edit that a form may send as files."""
TRUNCATED = "The prompt is longer than the tokenizer takes; what came after its limit had no effect."
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 404, 413, 429, 500, 503, 504)
}


class Backend(Protocol):
    """Where pictures and plans come from. All calls raise RequestRefused (429, 503, 504) where the sampler cannot answer."""

    async def info(self) -> ModelInfo: ...

    async def draw(self, requests: Sequence[Any]) -> list[Any]:
        """Pictures of SamplingRequests, plans of ActionRequests."""

    async def ready(self) -> bool: ...


class Authentication:
    """Refuses, before a byte of the body is read, whatever is not open and brings no known key."""

    def __init__(self, app: ASGIApp, *, hashes: Sequence[str]) -> None:
        self._app, self._hashes = app, tuple(hashes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._hashes or scope.get("path") in OPEN_ROUTES:
            return await self._app(scope, receive, send)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and keys.permits(key.strip(), self._hashes):
            return await self._app(scope, receive, send)
        message = "Incorrect API key provided." if key else "No API key provided: send 'Authorization: Bearer <key>'."
        refusal = refusals.response(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await refusal(scope, receive, send)


class TooLarge:
    """Puts FastAPI's refusal of a large body, which is plain text, into OpenAI's form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def in_form(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == 413:
                replaced = True
                await refusals.response(413, "The request body is too large.")(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, in_form)


def create(config: ServeConfig, backend: Backend, *, key_hashes: Sequence[str]) -> ASGIApp:
    """The endpoint as an ASGI app. Without `key_hashes` it is open: `keys.require` has to allow that first."""
    app = FastAPI(
        title="latentray",
        version=latentray.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",  # not open: Authentication asks for a key
        max_body_size=config.max_body_bytes,
        responses=_ERRORS,
    )
    refusals.install(app)
    limits = Limits.of(config)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "alive"}

    @app.get("/readyz", response_model=None)
    async def readyz() -> Any:
        """A model is loaded and can sample."""
        if await backend.ready():
            return {"status": "ready"}
        return refusals.response(503, "No model is loaded yet.", code="model_not_ready")

    @app.get("/v1/models")
    async def models() -> ModelList:
        """What is served, with samplers, bounds, conditions and defaults."""
        info = await backend.info()
        return ModelList(data=[_model(name, info) for name in limits.names(info)])

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Model:
        """One served model."""
        info = await backend.info()
        model_known(model, info, limits)
        return _model(model, info)

    @app.post("/v1/images/generations")
    async def generations(request: ImagesRequest) -> ImagesReply:
        """Draw pictures from a prompt, a class (`label`) or a picture to vary (`like`)."""
        info = await backend.info()
        # in a thread, as all that reads pictures: it would hold up the event loop
        admitted = await run_in_threadpool(admit, request, info, limits, fresh_seed=secrets.randbits(32))
        pictures = await backend.draw(admitted.pictures)
        return await run_in_threadpool(_reply, request, admitted, pictures)

    @app.post("/v1/images/edits", openapi_extra=forms.documented(EditsRequest, files=EDIT_FILES))
    async def edits(sent: Request) -> ImagesReply:
        """Change a picture, paint a part of it anew, or, by a super-resolution model, make it larger."""
        body, content_type = await sent.body(), sent.headers.get("content-type", "")
        request = await run_in_threadpool(forms.parse, EditsRequest, body, content_type, files=EDIT_FILES)
        info = await backend.info()
        admitted = await run_in_threadpool(admit_edits, request, info, limits, fresh_seed=secrets.randbits(32))
        pictures = await backend.draw(admitted.pictures)
        return await run_in_threadpool(_reply, request, admitted, pictures)

    @app.post("/v1/videos/generations")
    async def clips(request: VideosRequest) -> VideosReply:
        """Draw clips from a prompt."""
        info = await backend.info()
        admitted = admit_clips(request, info, limits, fresh_seed=secrets.randbits(32))
        drawn = await backend.draw(admitted.pictures)
        return await run_in_threadpool(_clips_reply, request, info.fps, admitted, drawn)

    @app.post("/v1/actions")
    async def actions(request: ActionsRequest) -> ActionsReply:
        """The next actions of one robot."""
        info = await backend.info()
        asked = admit_actions(request, info, limits, fresh_seed=secrets.randbits(32))
        (plan,) = await backend.draw([asked])
        return _plan_reply(asked, info, plan)

    # Around the app and not among its middlewares: FastAPI's own body limit stands outside those.
    return Authentication(TooLarge(app), hashes=key_hashes)


def _model(name: str, info: ModelInfo) -> Model:
    return Model(id=name, created=info.created, latentray=info.public())


def _reply(request: ImagesRequest, admitted: Admitted, pictures: Sequence[Picture]) -> ImagesReply:
    """Encode the pictures; in a thread, since PNG compression would hold up the event loop."""
    output_format = request.output_format or "png"
    data = []
    for asked, picture in zip(admitted.pictures, pictures, strict=True):
        parameters = _parameters(asked, picture)
        encoded = encode(picture.pixels_HWC, output_format, quality=request.output_compression, parameters=parameters)
        data.append(ImageData(b64_json=base64.b64encode(encoded).decode(), seed=asked.seed))
    return ImagesReply(data=data, output_format=output_format, **_of_all(admitted, pictures))


def _clips_reply(request: VideosRequest, own_fps: float, admitted: Admitted, drawn: Sequence[Picture]) -> VideosReply:
    """Encode the clips, in a thread as pictures are."""
    output_format, fps = request.output_format or "webp", request.fps or own_fps
    frames = admitted.pictures[0].frames
    data = []
    for asked, clip in zip(admitted.pictures, drawn, strict=True):
        about = json.dumps(_parameters(asked, clip) | {"frames": frames, "fps": fps}, sort_keys=True)
        encoded = animations.encode(
            clip.pixels_HWC, output_format, fps=fps, quality=request.output_compression, parameters=about
        )
        data.append(ImageData(b64_json=base64.b64encode(encoded).decode(), seed=asked.seed))
    return VideosReply(data=data, output_format=output_format, frames=frames, fps=fps, **_of_all(admitted, drawn))


def _plan_reply(asked: ActionRequest, info: ModelInfo, plan: Plan) -> ActionsReply:
    assert info.policy is not None, "refused by admission"
    return ActionsReply(
        created=int(time.time()),
        model=plan.release_id,
        actions=plan.actions_TA.tolist(),
        executed=info.policy.executed,
        seed=asked.seed,
        sampler=asked.sampler,
        num_inference_steps=asked.steps,
    )


def _parameters(asked: SamplingRequest, drawn: Picture) -> dict[str, Any]:
    """How one picture or clip was drawn: what its file says."""
    edit = {} if asked.picture_HWC is None else {"strength": asked.strength, "masked": asked.mask_HW is not None}
    return (
        {
            "prompt": asked.prompt,
            "negative_prompt": asked.negative_prompt,
            "model": drawn.release_id,
            "seed": asked.seed,
            "sampler": asked.sampler,
            "num_inference_steps": asked.steps,
            "guidance_scale": asked.guidance_scale,
            "size": f"{asked.width}x{asked.height}",
        }
        | edit
        | ({} if asked.label is None else {"label": asked.label})
        | ({} if not asked.classifier_scale else {"classifier_scale": asked.classifier_scale})
    )


def _of_all(admitted: Admitted, drawn: Sequence[Picture]) -> dict[str, Any]:
    """What a reply says of all its pictures or clips together."""
    first = admitted.pictures[0]
    truncated = any(one.truncated for one in drawn)
    return {
        "created": int(time.time()),
        "model": drawn[-1].release_id,
        "size": f"{first.width}x{first.height}",
        "seed": admitted.seed,
        "sampler": first.sampler,
        "num_inference_steps": first.steps,
        "guidance_scale": first.guidance_scale,
        "warnings": admitted.warnings + ([TRUNCATED] if truncated else []),
    }
