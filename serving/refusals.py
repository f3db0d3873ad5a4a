"""Every error the endpoint answers, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from latentray.errors import RequestRefused

logger = logging.getLogger("ray.serve")

RETRY_AFTER_S = 1
"""Seconds a refused client should wait before it tries again."""
_MESSAGES = {
    404: "There is no such route.",
    405: "The route does not take this method.",
    413: "The request body is too large.",
}


def response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error reply; 429 and 503 tell the client when to come back."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    headers = dict(headers or {})
    if status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Make an app answer every error in OpenAI's form."""
    app.add_exception_handler(RequestRefused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestRefused)
    return response(error.status, error.what, param=error.param, code=error.code)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response(400, **explain(error.errors()[0]))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = _MESSAGES.get(error.status_code, str(error.detail))
    return response(error.status_code, message, headers=dict(error.headers or {}))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("request failed: %s %s", request.method, request.url.path, exc_info=error)
    return response(500, "The server failed on this request; its log has the cause.", code="internal_error")


def explain(error: dict[str, Any]) -> dict[str, Any]:
    """Message, param and code for one of pydantic's errors. Never repeats the input."""
    kind = error["type"]
    param = ".".join(str(part) for part in error["loc"][1:]) or None
    if kind == "json_invalid":
        return {"message": "The request body is not valid JSON.", "param": None, "code": "invalid_json"}
    if param is None:
        return {
            "message": "The request body must be a JSON object (Content-Type: application/json).",
            "code": "invalid_body",
        }
    if kind == "extra_forbidden":
        return {"message": f"Unknown parameter: {param[:80]!r}.", "param": param[:80], "code": "unknown_parameter"}
    if kind == "missing":
        return {
            "message": f"Missing required parameter: {param!r}.",
            "param": param,
            "code": "missing_required_parameter",
        }
    return {"message": f"Invalid {param}: {error['msg']}.", "param": param, "code": kind}


def shown(value: str | None) -> str:
    """A client's text as an error message may repeat it: quoted and short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "...'"
