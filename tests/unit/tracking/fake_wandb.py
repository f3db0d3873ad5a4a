"""A W&B server of one run on loopback, which can stop working at any moment; and a reader of what wandb wrote offline.

It answers the GraphQL that a run's start, history and end ask, and keeps the lines of history as they arrive.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

STALL_S = 60.0


class Server(ThreadingHTTPServer):
    """`mode` is `serve`, `error` (500 to everything) or `stall` (no answer for a minute); it may change at any time."""

    daemon_threads = True

    def __init__(self, mode: str = "serve") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode = mode
        self.lines: dict[int, dict[str, Any]] = {}
        """History by its place in the server's file."""
        self.runs: set[str] = set()
        self.released = threading.Event()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def steps(self) -> list[int]:
        return [int(self.lines[place]["_step"]) for place in sorted(self.lines)]

    def bucket(self, name: str) -> dict[str, Any]:
        last = self.lines[max(self.lines)] if self.lines else {}
        return {
            "id": "QnVja2V0",
            "name": name,
            "displayName": name,
            "description": "",
            "config": "{}",
            "sweepName": None,
            "summaryMetrics": json.dumps({"_step": last["_step"]} if last else {}),
            "logLineCount": 0,
            "historyLineCount": len(self.lines),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(last)] if last else []),
            "eventsTail": "[]",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
            "project": {"id": "UHJvamVjdA", "name": "latentray", "entity": {"id": "RW50aXR5", "name": "us"}},
        }

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or next(iter(self.runs), "")
        if "upsertBucket" in query:
            inserted = name not in self.runs
            self.runs.add(name)
            return {"upsertBucket": {"bucket": self.bucket(name), "inserted": inserted}}
        if "RunResumeStatus" in query:
            found = self.bucket(name) if name in self.runs else None
            return {"model": {"id": "M", "name": "latentray", "entity": {"id": "E", "name": "us"}, "bucket": found}}
        if "createRunFiles" in query:
            files = [{"name": one, "uploadUrl": f"{self.url}/upload/{one}"} for one in variables["files"]]
            return {"createRunFiles": {"runID": "R", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "V", "entity": "us", "username": "us", "flags": "{}", "teams": {"edges": []}}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}
        return {}


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(self.path)
        if self.server.mode == "stall":
            self.server.released.wait(STALL_S)
            self.close_connection = True
            return
        if self.server.mode == "error":
            self._send(500, {"error": "out of order"})
        elif self.path == "/graphql":
            asked = json.loads(body)
            self._send(200, {"data": self.server.answer(asked["query"], asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            history = (json.loads(body).get("files") or {}).get("wandb-history.jsonl") or {}
            for place, line in enumerate(history.get("content", []), start=history.get("offset", 0)):
                self.server.lines[place] = json.loads(line)
            self._send(200, {})
        else:
            self._send(200, {})

    do_GET = do_POST = do_PUT = _serve

    def _send(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a client that was stopped in the middle
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def running(mode: str = "serve") -> Iterator[Server]:
    server = Server(mode)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes of its own, blocks of 32 KiB with fragments of records.

    A fragment is checksum (4), length (2), type (1: whole, 2: first, 3: middle, 4: last) and data.
    """
    file, block, at, parts = path.read_bytes(), 32768, 7, []
    while at + 7 <= len(file):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(file[at + 4 : at + 6], "little"), file[at + 6]
        if at + 7 + length > len(file):
            return  # cut off
        parts.append(file[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def history(folder: Path) -> list[dict[str, Any]]:
    """The lines of history that wandb keeps in a run's folder, in order."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    lines = []
    for raw in records(path):
        record = wandb_internal_pb2.Record.FromString(raw)
        if record.HasField("history"):
            items = {one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in record.history.item}
            lines.append({"_step": record.history.step.num} | items)
    return lines
