"""Byte ranges of remote files, one request each, with errors that tell a file that is not there from a server that fails.

Web servers are asked here: what pyarrow and fsspec make of HTTP takes a 503 for a missing file, which would count as damage.
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from latentray.checkpoint import store
from latentray.errors import StorageFailed

_TIMEOUT_S = 25
_CHUNK = 1 << 20
_WITHOUT_RANGES = 64 << 20
"""The largest file that is read from a server which sends whole files only."""
_GONE = (404, 410)
_OUTSIDE = 416


def read_range(uri: str, offset: int, length: int) -> bytes:
    """`length` bytes at `offset` of a remote file, by one request that is not tried again.

    Raises FileNotFoundError where there is no file, EOFError where it ends before, OSError where it cannot be read, within
    half a minute; StorageFailed where its server sends no ranges and the file is large.
    """
    if not _is_web(uri):
        return store.read_range(uri, offset, length)
    with _answer(uri, {"Range": f"bytes={offset}-{offset + length - 1}"}) as reply:
        if reply.status == http.client.PARTIAL_CONTENT:
            there = int(reply.headers["Content-Length"] or length)
        else:
            there = _require_small(uri, reply) - offset
            _skip(reply, offset)
        data = reply.read(length)
    if len(data) < min(there, length):
        raise OSError(f"{uri}: the connection was lost after {len(data)} of {there} bytes")
    if len(data) < length:
        raise EOFError(f"{uri} ends before byte {offset + length}")
    return data


def size_of(uri: str) -> int:
    """Bytes of a remote file. Raises as `read_range`."""
    if not _is_web(uri):
        filesystem, path = store.filesystem(uri)
        info = filesystem.get_file_info(path)
        if not info.is_file:
            raise FileNotFoundError(uri)
        return info.size
    try:
        with _answer(uri, {"Range": "bytes=0-0"}) as reply:  # signed URLs allow a GET, and no HEAD
            if reply.status != http.client.PARTIAL_CONTENT:
                return _require_small(uri, reply)
            return int(reply.headers["Content-Range"].rpartition("/")[2])
    except EOFError:
        return 0


@contextmanager
def _answer(uri: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
    request = urllib.request.Request(uri, headers={**headers, "Accept-Encoding": "identity"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
            yield reply
    except urllib.error.HTTPError as error:  # an OSError, like a lost connection
        if error.code in _GONE:
            raise FileNotFoundError(uri) from None
        if error.code == _OUTSIDE:
            raise EOFError(f"{uri} is shorter") from None
        raise
    except (http.client.HTTPException, ValueError) as error:  # a body that breaks off; headers that say nothing
        raise OSError(f"{uri}: {type(error).__name__}: {error}") from error


def _is_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _require_small(uri: str, reply: http.client.HTTPResponse) -> int:
    """The size of a file that came whole."""
    size = reply.headers["Content-Length"]
    if size is None or int(size) > _WITHOUT_RANGES:
        raise StorageFailed(
            "The web server sends no byte ranges, only whole files.",
            where=uri,
            mend="Use a server that knows ranges, or copy the shards to a disk or an object store.",
        )
    return int(size)


def _skip(reply: http.client.HTTPResponse, count: int) -> None:
    while count and (data := reply.read(min(count, _CHUNK))):
        count -= len(data)
