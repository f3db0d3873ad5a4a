"""Whether every node can write, list, read and delete at a URI, and whether all of them see the same files.

Each node writes a file; each lists the folder and reads every file; each deletes its own.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from latentray.checkpoint import store
from latentray.errors import LatentrayError
from latentray.planning import machine
from latentray.planning.findings import Finding, first_line

NAME = "storage"
SIZE = 4 << 20
"""Bytes of each node's file."""
_CONNECT_S = 5.0
Do = Callable[..., Any]
"""Calls a function of this module on one node: do(write, uri)."""


def here(function: Callable[..., Any], *args: Any) -> Any:
    """A node that is this process."""
    return function(*args)


def endpoint_error(uri: str) -> str:
    """Why nothing listens at the S3 endpoint that is set; asked first, since S3 clients try for minutes."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not uri.startswith("s3://") or not endpoint:
        return ""
    url = urlsplit(endpoint)
    port = url.port or (443 if url.scheme == "https" else 80)
    error = machine.connect_error(str(url.hostname), port, _CONNECT_S)
    return f"{endpoint} does not answer: {error}" if error else ""


def write(uri: str) -> float:
    """Seconds to write one file."""
    began = time.perf_counter()
    store.write_bytes(uri, _content(uri))
    return time.perf_counter() - began


def names(uri: str) -> list[str]:
    return store.list_files(uri)


def is_whole(uri: str) -> bool:
    """Whether a file holds what `write` put there."""
    return store.read_bytes(uri) == _content(uri)


def delete(uri: str) -> bool:
    """Whether a file is gone after it was deleted."""
    store.delete(uri)
    return not store.exists(uri)


def clear(folder: str, *, and_parent: bool) -> None:
    """Leave nothing behind; what cannot be deleted was told. A parent that was made for this goes where it is empty."""
    with contextlib.suppress(Exception):
        store.delete(folder)
        if and_parent and not store.is_remote(folder):
            store.local_path(folder).parent.rmdir()


class _Refused(Exception):
    """A step failed: the finding says which."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.what)
        self.finding = finding


def check(uri: str, nodes: Mapping[str, Do]) -> list[Finding]:
    """The check from all nodes; the first thing that fails ends it, since the rest would follow from it."""
    uri = store.absolute(uri)
    is_new = not store.is_remote(uri) and not store.exists(uri)
    folder = store.join(uri, f".doctor-{uuid.uuid4().hex[:8]}")
    for node, do in nodes.items():
        error = do(endpoint_error, uri)
        if error:
            return [Finding.failed(NAME, f"from {node}: {error}", _MEND["reach"])]
    try:
        seconds = _in_turn(uri, folder, nodes)
    except _Refused as refused:
        return [refused.finding]
    finally:
        for do in nodes.values():
            with contextlib.suppress(Exception):
                do(partial(clear, folder, and_parent=is_new))
    many = f" from {len(nodes)} nodes" if len(nodes) > 1 else ""
    rate = f"{SIZE / seconds / 1e6:,.0f} MB/s"
    return [Finding.ok(NAME, f"write, list, read, delete at {uri}{many}; a file of 4 MiB goes at {rate}")]


def _in_turn(uri: str, folder: str, nodes: Mapping[str, Do]) -> float:
    """The steps; seconds of the slowest write."""
    files = {node: store.join(folder, f"node-{number}") for number, node in enumerate(nodes)}
    wanted = sorted(file.rsplit("/", 1)[-1] for file in files.values())
    slowest = max(_step("write", node, do, write, files[node]) for node, do in nodes.items())
    for node, do in nodes.items():
        seen = _step("list", node, do, names, folder)
        if sorted(seen) != wanted:
            raise _Refused(_not_shared(uri, node, len(seen), len(wanted)))
        for file in files.values():
            if not _step("read", node, do, is_whole, file):
                what = f"{node} read other bytes than were written at {uri}"
                raise _Refused(Finding.failed(NAME, what, "Use another storage."))
    for node, do in nodes.items():
        if not _step("delete", node, do, delete, files[node]):
            what = f"{node} deleted a file at {uri}, and it is still there"
            raise _Refused(Finding.failed(NAME, what, _MEND["delete"]))
    return slowest


_MEND = {
    "reach": "Start the object store, or set AWS_ENDPOINT_URL to where it is.",
    "write": "Give a folder or bucket that can be written: storage=<path or s3 URI>, its credentials and endpoint.",
    "list": "Allow listing (s3:ListBucket).",
    "read": "Allow reading (s3:GetObject).",
    "delete": "Allow deleting (s3:DeleteObject): old checkpoints are removed, and half-written ones.",
}


def _step(verb: str, node: str, do: Do, function: Callable[..., Any], *args: Any) -> Any:
    """The result of one step. Raises _Refused where it fails."""
    try:
        return do(function, *args)
    except LatentrayError as error:
        said = error.what
    except Exception as error:  # what a file system raises, and what Ray makes of it
        said = getattr(error, "strerror", None) or first_line(error)
    raise _Refused(Finding.failed(NAME, f"{node} cannot {verb} at {args[0]}: {said}", _MEND[verb]))


def _not_shared(uri: str, node: str, seen: int, wanted: int) -> Finding:
    if store.is_remote(uri):
        what = f"{node} lists {seen} of {wanted} files at {uri}"
        return Finding.failed(NAME, what, "Use a storage that lists what was written.")
    return Finding.warning(
        NAME,
        f"{uri} is not one folder on all nodes: {node} sees {seen} of {wanted} files",
        "Give out= and data= as s3:// URIs, or a path on a disk that all nodes mount.",
    )


def _content(uri: str) -> bytes:
    """Differs from file to file."""
    head = uri.encode()
    return head + bytes(SIZE - len(head))
