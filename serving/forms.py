"""The body of a route that takes files: a multipart form, as OpenAI's clients send it, or JSON with its files in base64."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Collection
from email.message import Message
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

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


def _parts(body: bytes, boundary: str | None) -> list[tuple[str, bool, bytes]]:
    """Name, whether it has a file's name, and content of each part (RFC 2046, section 5.1.1)."""
    if not boundary:
        raise _damaged("its Content-Type names no boundary")
    form = _Form()
    parser = MultipartParser(boundary.encode("latin-1", "replace"), form.callbacks())  # type: ignore[arg-type]
    try:
        parser.write(body)
    except MultipartParseError as error:
        raise _damaged(str(error)) from None
    if not form.ended:
        raise _damaged("it is cut off")
    return form.parts


class _Form:
    """Gathers the parts that a `MultipartParser` finds; it tells of each in pieces."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, bool, bytes]] = []
        self.ended = False
        self._field, self._value, self._content = bytearray(), bytearray(), bytearray()
        self._disposition: bytes | None = None

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ends,
            "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
            "on_part_end": self._part_ends,
            "on_end": self._ends,
        }

    def _header_ends(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _part_ends(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _damaged("a field has no name")
        if len(self.parts) == MAX_PARTS:
            raise _damaged("it has too many fields")
        self.parts.append((options[b"name"].decode(errors="replace"), b"filename" in options, bytes(self._content)))
        self._content.clear()
        self._disposition = None

    def _ends(self) -> None:
        self.ended = True


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
