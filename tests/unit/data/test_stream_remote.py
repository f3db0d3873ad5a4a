"""Streams over HTTP and S3: the same samples through faults, each byte once."""

import http.server
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from gray_shards import run, write_shards

from latentray.checkpoint import store
from latentray.errors import DataError, StorageFailed


class Files(http.server.SimpleHTTPRequestHandler):
    """Ranges of files, as web servers give them; now and then a 503 first."""

    protocol_version = "HTTP/1.1"
    root, faults, served = "", 0, 0
    spared = "bytes=0-0"
    """The range that meets no fault: it asks for a size."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        kind = type(self)
        try:
            data = Path(kind.root + self.path).read_bytes()
        except FileNotFoundError:
            return self._send(404, b"", {}, body)
        if body and kind.faults > 0 and self.headers.get("Range") != kind.spared:
            kind.faults -= 1
            return self._send(503, b"", {}, body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, data, {"Accept-Ranges": "bytes"}, body)
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        kind.served += last + 1 - first
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}", "Accept-Ranges": "bytes"}
        return self._send(206, data[first : last + 1], headers, body)

    def _send(self, status, data, headers, body):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def web(tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    store._ranged.cache_clear()
    handler = type("Handler", (Files,), {"root": str(tmp_path / "web")})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    store._ranged.cache_clear()
    server.shutdown()
    server.server_close()


def test_a_stream_over_http_is_the_same_through_faults_and_each_byte_comes_once(web, tmp_path):
    uris = write_shards(tmp_path / "web", [6] * 4)
    far = [f"{web.url}/{n:05d}.tar" for n in range(4)]
    web.faults = 3
    near, made = run(uris, steps=12), run(far, steps=12)
    for one, other in zip(near, made, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.x_BCHW, other.x_BCHW)
    traffic = sum((batch.traffic for batch in made), start=type(made[0].traffic)())
    assert web.faults == 0 and traffic.retries >= 3
    total = sum((tmp_path / "web" / f"{n:05d}.tar").stat().st_size for n in range(4))
    assert traffic.fetched_bytes == total  # two epochs: the second from the cache


def test_a_stream_from_s3_is_the_same(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    store._ranged.cache_clear()
    uris = write_shards(tmp_path / "near", [6] * 4)
    for uri in uris:
        store.upload(tmp_path / "near" / uri.rsplit("/", 1)[-1], moto_s3.uri("set", uri.rsplit("/", 1)[-1]))
    for one, other in zip(run(uris), run([moto_s3.uri("set")]), strict=True):
        assert one.ids == other.ids and torch.equal(one.x_BCHW, other.x_BCHW)


@pytest.mark.parametrize("spared", ["bytes=0-0", ""])
def test_a_far_shard_that_is_missing_is_damage_at_once_and_a_dead_server_is_not(web, tmp_path, spared):
    write_shards(tmp_path / "web", [6] * 4)
    far = [f"{web.url}/{n:05d}.tar" for n in (0, 1, 7)]
    began = time.perf_counter()
    with pytest.raises(DataError, match="missing") as caught:
        run(far, steps=12)
    assert caught.value.where == far[2] and time.perf_counter() - began < 5
    found = [one for batch in run(far, steps=3, skip_damaged=True, max_bad_fraction=0.5) for one in batch.damaged]
    assert [(one.shard, one.reason) for one in found] == [(far[2], "missing")]
    web.faults, web.spared = 10_000, spared
    began = time.perf_counter()
    with pytest.raises(StorageFailed) as stopped:
        run([f"{web.url}/00003.tar"], steps=3, batch=1, skip_damaged=True, max_bad_fraction=1.0, budget_s=1.0)
    assert stopped.value.where.endswith("00003.tar") and time.perf_counter() - began < 15
