"""Ranges over HTTP: a file that is not there, one that is too short and a server that fails are three things."""

import http.server
import re
import threading

import pytest

from latentray.data import ranges
from latentray.errors import StorageFailed

CONTENT = bytes(range(256)) * 40


class Server(http.server.BaseHTTPRequestHandler):
    """What the path asks for: /ranges, /whole (no ranges), /huge (none either), /cut, /empty, or a status."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.strip("/")
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if name.isdigit():
            self._send(int(name), b"")
        elif name == "empty" or (name == "ranges" and first >= len(CONTENT)):
            self._send(416, b"")
        elif name in ("ranges", "cut"):
            part = CONTENT[first : last + 1]
            about = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(CONTENT)}"}
            self._send(206, part[: len(part) // 2] if name == "cut" else part, about, length=len(part))
        else:
            self._send(200, CONTENT, length=len(CONTENT) if name == "whole" else 1 << 30)

    def _send(self, status, data, headers=None, *, length=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True


@pytest.fixture(scope="module")
def url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["ranges", "whole"])
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, len(CONTENT)), (700, 3000), (len(CONTENT) - 1, 1)])
def test_a_range_is_what_lies_there_with_and_without_the_servers_help(url, name, offset, length):
    assert ranges.read_range(f"{url}/{name}", offset, length) == CONTENT[offset : offset + length]


@pytest.mark.parametrize(("name", "size"), [("ranges", len(CONTENT)), ("whole", len(CONTENT)), ("empty", 0)])
def test_a_size_is_found_without_reading_the_file(url, name, size):
    assert ranges.size_of(f"{url}/{name}") == size


@pytest.mark.parametrize("ask", [lambda uri: ranges.read_range(uri, 0, 10), ranges.size_of])
@pytest.mark.parametrize("status", [404, 410])
def test_what_is_not_there_is_missing(url, ask, status):
    with pytest.raises(FileNotFoundError):
        ask(f"{url}/{status}")


@pytest.mark.parametrize("ask", [lambda uri: ranges.read_range(uri, 0, 10), ranges.size_of])
@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_a_server_that_fails_is_not(url, ask, status):
    with pytest.raises(OSError) as caught:
        ask(f"{url}/{status}")
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", ["ranges", "whole"])
def test_a_file_that_ends_before_says_so(url, name):
    for offset in (len(CONTENT) - 10, len(CONTENT) + 10):
        with pytest.raises(EOFError):
            ranges.read_range(f"{url}/{name}", offset, 100)


def test_a_body_that_breaks_off_is_a_failure_and_not_an_end(url):
    with pytest.raises(OSError) as caught:
        ranges.read_range(f"{url}/cut", 0, 1000)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("ask", [lambda uri: ranges.read_range(uri, 0, 10), ranges.size_of])
def test_a_large_file_of_a_server_without_ranges_is_refused(url, ask):
    with pytest.raises(StorageFailed, match="no byte ranges"):
        ask(f"{url}/huge")


def test_an_address_that_nobody_answers_is_a_failure():
    with pytest.raises(OSError) as caught:
        ranges.read_range("http://127.0.0.1:9/x", 0, 1)
    assert not isinstance(caught.value, FileNotFoundError)


def test_objects_of_a_store_are_asked_for_as_ever(moto_s3):
    from latentray.checkpoint import store

    store._ranged.cache_clear()
    store.write_bytes(moto_s3.uri("x"), CONTENT)
    assert ranges.size_of(moto_s3.uri("x")) == len(CONTENT)
    assert ranges.read_range(moto_s3.uri("x"), 700, 30) == CONTENT[700:730]
    with pytest.raises(FileNotFoundError):
        ranges.size_of(moto_s3.uri("y"))
    store._ranged.cache_clear()
