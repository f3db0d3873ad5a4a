"""The body of a route that takes files: a multipart form, as OpenAI's clients send it, or JSON with its files in base64."""

from __future__ import annotations

import base64
import copy
from collections.abc import Collection, Iterator
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from latentray.errors import RequestRefused

MAX_PARTS = 64
"""Of a form; no route has so many fields."""
_Request = TypeVar("_Request", bound=BaseModel)


def parse(kind: type[_Request], body: bytes, content_type: str, *, files: Collection[str]) -> _Request:
    """A request of `kind`; the fields called `files` are base64 in it, however they were sent.

    Raises RequestRefused for a body that is neither a form nor JSON, RequestValidationError for one that does not fit `kind`.
    """
    about = Message()
    about["content-type"] = content_type
    try:
        if about.get_content_type() == "multipart/form-data":
            return kind.model_validate_strings(fields(body, about.get_boundary(), files=files))
        if about.get_content_type() == "application/json":
            return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None
    raise RequestRefused(
        "The request body must be a form (Content-Type: multipart/form-data) or a JSON object (application/json).",
        code="invalid_body",
    )


def fields(body: bytes, boundary: str | None, *, files: Collection[str]) -> dict[str, str]:
    """Name -> value of a multipart form (RFC 7578); files in base64. `name[]`, as lists of files are sent, is `name`.

    Raises RequestRefused for a form that is cut off or damaged, a field given twice, a file where none is taken.
    """
    found: dict[str, str] = {}
    for name, is_file, content in _parts(body, boundary):
        name = name.removesuffix("[]")
        if name in found:
            raise RequestRefused(f"{name[:80]!r} is given twice; one is taken.", param=name[:80])
        if is_file and name not in files:
            raise RequestRefused(f"{name[:80]!r} is sent as a file; send its text.", param=name[:80])
        if is_file:
            found[name] = base64.b64encode(content).decode()
            continue
        try:
            found[name] = content.decode()
        except UnicodeDecodeError:
            raise RequestRefused(f"{name[:80]!r} is no text in UTF-8.", param=name[:80]) from None
    return found


def _parts(body: bytes, boundary: str | None) -> Iterator[tuple[str, bool, bytes]]:
    """Name, whether it has a file's name, and content of each part (RFC 2046, section 5.1.1)."""
    if not boundary:
        raise _damaged("its Content-Type names no boundary")
    _, *pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode("latin-1", "replace"), MAX_PARTS + 2)
    ends = [i for i, piece in enumerate(pieces) if piece.startswith(b"--")]
    if not ends:
        raise _damaged("it is cut off, or has too many fields")
    for piece in pieces[: ends[0]]:
        padding, line, rest = piece.partition(b"\r\n")
        head, blank, content = rest.partition(b"\r\n\r\n")
        if padding.strip() or not line or not blank:
            raise _damaged("a field has no header")
        header = BytesHeaderParser().parsebytes(head)
        name = header.get_param("name", header="content-disposition")
        if not isinstance(name, str):
            raise _damaged("a field has no name")
        yield name, header.get_param("filename", header="content-disposition") is not None, content


def _damaged(why: str) -> RequestRefused:
    return RequestRefused(f"The form cannot be read: {why}.", code="invalid_body")


def documented(kind: type[BaseModel], *, files: Collection[str]) -> dict[str, Any]:
    """What a route that calls `parse` adds to its OpenAPI description."""
    as_json = kind.model_json_schema()
    as_form = copy.deepcopy(as_json)
    for name in files:
        about = as_form["properties"][name].get("description", "")
        as_form["properties"][name] = {"type": "string", "format": "binary", "description": about}
    content = {"multipart/form-data": {"schema": as_form}, "application/json": {"schema": as_json}}
    return {"requestBody": {"required": True, "content": content}}
