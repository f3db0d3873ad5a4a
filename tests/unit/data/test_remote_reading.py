"""Shards in an object store: the same samples as from a disk, through faults, without a byte too many."""

import collections
import http.client
import http.server
import io
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.data import index, shards
from latentray.data.lines import Reading
from latentray.data.ordering import Order
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource
from latentray.data.transforms import Augment
from latentray.errors import DigestMismatch, StorageFailed

SHARDS, EACH, B = 6, 32, 24


class Proxy(http.server.BaseHTTPRequestHandler):
    """Before the S3 server: now and then a 503, a slow body, or a body that breaks off."""

    protocol_version = "HTTP/1.1"
    target: ClassVar[str]
    faults: ClassVar[collections.deque[str]]

    def log_message(self, *args) -> None:
        pass

    def _forward(self) -> None:
        connection = http.client.HTTPConnection(self.target, timeout=20)
        connection.request(self.command, self.path, headers=dict(self.headers))
        reply = connection.getresponse()
        data = reply.read()
        connection.close()
        fault = self.faults.popleft() if self.command == "GET" and ".tar" in self.path and self.faults else ""
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", reply.getheader("Content-Length") or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        if fault == "slow":
            for i in range(0, len(data), max(len(data) // 8, 1)):
                self.wfile.write(data[i : i + max(len(data) // 8, 1)])
                self.wfile.flush()
                time.sleep(0.05)
            return
        self.wfile.write(data)

    do_GET = do_HEAD = _forward


@pytest.fixture
def proxy(moto_s3, monkeypatch, tmp_path):
    handler = type(
        "Handler",
        (Proxy,),
        {"target": moto_s3.endpoint.removeprefix("http://"), "faults": collections.deque()},
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    store._ranged.cache_clear()
    handler.stand_between = lambda: monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield handler
    store._ranged.cache_clear()
    server.shutdown()
    server.server_close()


def build(root):
    folder = root / "built"
    folder.mkdir()
    noise = np.random.default_rng(0)
    made = []
    for number in range(SHARDS):
        some = []
        for i in range(EACH):
            buffer = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
            key = f"{number * EACH + i:05d}"
            some.append(shards.Sample(key=key, members={"png": buffer.getvalue(), "txt": b"x", "json": b"{}"}))
        made.append(shards.write_shard(some, folder / shards.shard_name(number)))
    index.write(made, folder / index.NAME)
    return folder


def run(uri, *, steps, chunk=8, **opening):
    data = shards.IndexedShards.open(uri, **opening)
    order = Order.of(data.count, 5, B, reading=Reading(chunk=chunk, depth=4))
    source = OrderedSource([data], order, last_step=steps)
    return data, list(picture_batches(source, shapes=[(16, 16)], augment=Augment(flip=True)))


def test_faults_change_no_sample_and_hang_nothing(proxy, moto_s3, tmp_path):
    folder = build(tmp_path)
    manifest.publish(folder, tmp_path / "local", kind="dataset")
    manifest.publish(folder, moto_s3.uri("set"), kind="dataset")
    proxy.stand_between()
    proxy.faults.extend(["503", "slow", "cut", "", "503", "503", "cut", "slow"])
    began = time.perf_counter()
    data, remote = run(moto_s3.uri("set"), steps=2 * SHARDS * EACH // B, budget_s=30)
    assert time.perf_counter() - began < 25
    assert not proxy.faults
    _, local = run(tmp_path / "local", steps=2 * SHARDS * EACH // B)
    for one, other in zip(remote, local, strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.x_BCHW, other.x_BCHW)
    traffic = sum((batch.traffic for batch in remote), start=type(remote[0].traffic)())
    total = sum(entry.bytes for entry in data.shards)
    assert traffic.fetched_bytes <= total  # two epochs, and each byte came once: the second read from the cache
    assert traffic.cached_bytes > total / 4
    assert traffic.retries >= 4


def test_a_store_that_stays_down_ends_the_run_within_its_budget(proxy, moto_s3, tmp_path):
    manifest.publish(build(tmp_path), moto_s3.uri("set"), kind="dataset")
    proxy.stand_between()
    proxy.faults.extend(["503"] * 10_000)
    began = time.perf_counter()
    with pytest.raises(StorageFailed) as caught:
        run(moto_s3.uri("set"), steps=2, budget_s=1.0)
    assert ".tar" in caught.value.where
    assert time.perf_counter() - began < 15


@pytest.mark.parametrize("harm", ["missing", "cut"])
def test_a_shard_that_is_missing_or_cut_is_damage_at_once(proxy, moto_s3, tmp_path, harm):
    manifest.publish(build(tmp_path), moto_s3.uri("set"), kind="dataset")
    victim = moto_s3.uri("set", "00002.tar")
    if harm == "missing":
        store.delete(victim)
    else:
        store.write_bytes(victim, store.read_bytes(victim)[:3000])
    began = time.perf_counter()
    with pytest.raises(DigestMismatch) as caught:
        run(moto_s3.uri("set"), steps=SHARDS * EACH // B)
    assert caught.value.where == victim
    assert time.perf_counter() - began < 5


def test_a_damaged_cache_is_fetched_again(proxy, moto_s3, tmp_path):
    manifest.publish(build(tmp_path), moto_s3.uri("set"), kind="dataset")
    _, first = run(moto_s3.uri("set"), steps=4)
    for block in (tmp_path / "cache" / "blocks").glob("*/*"):
        block.write_bytes(bytes(block.stat().st_size))
    _, second = run(moto_s3.uri("set"), steps=4)
    assert all(torch.equal(a.x_BCHW, b.x_BCHW) for a, b in zip(first, second, strict=True))


def test_shards_are_read_over_http_too(proxy, moto_s3, tmp_path):
    folder = build(tmp_path)
    manifest.publish(folder, tmp_path / "local", kind="dataset")
    handler = type("Files", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tmp_path / "local"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        _, far = run(f"http://127.0.0.1:{server.server_port}", steps=3)
        _, near = run(tmp_path / "local", steps=3)
        assert all(torch.equal(a.x_BCHW, b.x_BCHW) for a, b in zip(far, near, strict=True))
    finally:
        server.shutdown()
        server.server_close()
