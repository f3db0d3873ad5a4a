"""W&B with a server that is gone: nothing waits for it, nothing is lost. Real sockets, real wandb, no network."""

import contextlib
import logging
import shlex
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from latentray import tracking
from latentray.config.tracking import TrackingConfig
from latentray.tracking import names, wandb_tracker


@contextlib.contextmanager
def _refusing():
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@contextlib.contextmanager
def _hanging():
    """A server that takes connections and never answers."""
    held: list[socket.socket] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


@contextlib.contextmanager
def _dying():
    """A server that answers one request, then hangs: wandb's own start fails, after it took the run's id."""
    held: list[socket.socket] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)

        def accept() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


def _payload(file: bytes) -> bytes:
    """The records of a .wandb file without its log format's headers, which may stand in the middle of a name.

    Blocks of 32 KiB; after the file's own 7 bytes, fragments of a header (checksum 4, length 2, type 1) and data.
    """
    block, at, out = 32768, 7, []
    while at + 7 <= len(file):
        if block - at % block < 7:
            at += block - at % block
            continue
        length = int.from_bytes(file[at + 4 : at + 6], "little")
        out.append(file[at + 7 : at + 7 + length])
        at += 7 + length
    return b"".join(out)


@pytest.fixture
def env(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return monkeypatch


@pytest.mark.parametrize("server", [_refusing, _hanging, _dying])
def test_a_dead_server_neither_delays_nor_loses_a_run(server, env, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_tracker, "_PROBE_SECONDS", 1.0)
    with server() as port:
        env.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        began = time.monotonic()
        tracker = tracking.open(
            TrackingConfig(mode="online", start_seconds=2.0), "dead1", tmp_path, {"stage": {"name": "x"}}
        )
        assert time.monotonic() - began < 8.0  # the import of wandb, once
        took = []
        with caplog.at_level(logging.WARNING):
            for step in range(1, 501):
                began = time.perf_counter()
                tracker.log(96 * step, {names.TRAIN_LOSS: 1 / step})
                took.append(time.perf_counter() - began)
            tracker.image(96 * 500, names.PICTURES_SAMPLES, np.zeros((16, 16, 3), np.uint8), "a caption")
            inputs = {"dataset": "sha256:" + "cd" * 32}
            tracker.artifact("mine", "autoencoder", "runs/a", "sha256:" + "ab" * 32, inputs, {"psnr": 25.0})
            began = time.monotonic()
            tracker.finish()
    assert np.percentile(took, 95) < 1e-3
    assert time.monotonic() - began < 15.0
    assert "recorded offline" in caplog.text
    assert "missed" not in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 500
    assert tracker.sync_command is not None
    *command, folder = shlex.split(tracker.sync_command)
    assert command == ["wandb", "sync", "--id", "dead1"]
    recorded = b"".join(_payload(path.read_bytes()) for path in Path(folder).glob("*.wandb"))
    assert recorded.count(b"train/loss") >= 500
    assert b"autoencoder-" + b"ab" * 8 in recorded
    assert b"dataset-" + b"cd" * 8 in recorded


def test_a_server_that_answers_is_reachable_and_a_refused_key_is_named(env):
    def answer(status: bytes) -> str | None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen(1)

            def serve() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            found = wandb_tracker.unreachable(f"http://127.0.0.1:{server.getsockname()[1]}", "k" * 40)
            thread.join(5)
            return found

    assert answer(b"200 OK") is None
    assert answer(b"401 Unauthorized") == "refused the API key"
    assert answer(b"503 Unavailable") == "answered 503"


class _StuckRun:
    """A run whose server stopped answering after the start."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def log(self, *_: object, **__: object) -> None:
        self.released.wait(30)

    def finish(self) -> None:
        self.released.wait(30)


def test_a_server_that_dies_on_the_way_blocks_neither_log_nor_finish(env, tmp_path, monkeypatch, caplog):
    run = _StuckRun()
    monkeypatch.setattr(wandb_tracker, "_QUEUE_SIZE", 10)
    monkeypatch.setattr(wandb_tracker.WandbTracker, "_init", lambda self, mode: run)
    tracker = tracking.open(TrackingConfig(mode="offline", finish_seconds=0.5), "stuck", tmp_path, {})
    began = time.monotonic()
    for step in range(100):
        tracker.log(step, {names.TRAIN_LOSS: 0.0})
    assert time.monotonic() - began < 1.0
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker.finish()
    assert time.monotonic() - began < 2.0
    assert "metrics.jsonl has" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
    run.released.set()


def test_a_late_picture_does_not_go_back_in_step(env, tmp_path, monkeypatch):
    steps: list[int] = []

    class Run:
        def log(self, values: dict, step: int) -> None:
            steps.append(step)

        def finish(self) -> None:
            pass

    monkeypatch.setattr(wandb_tracker.WandbTracker, "_init", lambda self, mode: Run())
    tracker = wandb_tracker.WandbTracker(TrackingConfig(mode="offline"), "r", tmp_path, {})
    tracker.log(200, {})
    tracker.image(100, names.PICTURES_SAMPLES, np.zeros((4, 4, 3), np.uint8))
    tracker.log(300, {})
    tracker.finish()
    assert steps == [200, 200, 300]
