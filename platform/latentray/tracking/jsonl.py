"""Metrics as JSON lines beside the run: always written, read by the reports, complete whatever happens to W&B.

metrics.jsonl     {"samples": 12800, "time": 1700000000.0, "train/loss": 0.12, ...}
artifacts.jsonl   {"name", "kind", "uri", "digest", "inputs", "metadata", "time"}
pictures/         <name>-<samples>.png
"""

from __future__ import annotations

import builtins
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
ARTIFACTS_FILE = "artifacts.jsonl"
PICTURES_FOLDER = "pictures"


class JsonlTracker:
    """Writes a run's metrics to `<run_folder>/metrics.jsonl`, one line per call, each with the system when the call returns.

    On a full disk the lines are kept, and written with the first one that finds room again.

    A resumed run appends: the half line that a killed process left, and the lines past the checkpoint it continues
    from (which it computes again), are dropped first. So samples never go back, and no step stands there twice.

    Args:
        resumed_at: samples seen by that checkpoint; 0 starts anew. None drops what is not before the first line logged.
    """

    def __init__(self, run_folder: Path, *, resumed_at: int | None = None) -> None:
        self._folder = Path(run_folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / METRICS_FILE
        self._file: FileIO | None = None
        self._unwritten = b""
        """Lines, the first perhaps in part, that a full disk did not take yet."""
        if resumed_at is not None:
            _keep(self._path, until=resumed_at)
            self._open()

    def log(self, samples: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            _keep(self._path, until=samples - 1)
            self._open()
        assert self._file is not None
        line: dict[str, Any] = {"samples": int(samples), "time": round(time.time(), 3)}
        line.update((name, _number(value)) for name, value in metrics.items())
        self._write((json.dumps(line) + "\n").encode())

    def image(self, samples: int, name: str, picture: str | Path | np.ndarray, caption: str = "") -> None:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("caption", caption)
        text.add_text("samples", str(samples))
        target = self._folder / PICTURES_FOLDER / f"{name.rsplit('/', 1)[-1]}-{int(samples):09d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture)
        partial = target.with_suffix(".part")
        image.save(partial, format="PNG", pnginfo=text)
        os.replace(partial, target)

    def artifact(
        self, name: str, kind: str, uri: str, digest: str, inputs: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> None:
        line: dict[str, Any] = {"name": name, "kind": kind, "uri": uri, "digest": digest, "inputs": dict(inputs)}
        line |= {"metadata": dict(metadata), "time": round(time.time(), 3)}
        with builtins.open(self._folder / ARTIFACTS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def finish(self) -> None:
        if self._file is not None and not self._file.closed:
            self._write(b"")
            self._file.close()

    def _write(self, line: bytes) -> None:
        """Append a line, and before it those that could not be written: training is worth more than its lines."""
        assert self._file is not None
        was_whole = not self._unwritten
        self._unwritten += line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if was_whole:
                logger.warning("%s could not be written (%s); its lines are kept and tried again.", self._path, error)

    @property
    def sync_command(self) -> None:
        return None

    def _open(self) -> None:
        self._file = FileIO(self._path, "a")  # not buffered: what the disk did not take is known


def _number(value: Any) -> float | int | str:
    """JSON has no NaN and no infinity: they become the strings that `float()` takes."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else str(float(number))


def _keep(path: Path, *, until: int) -> None:
    """Rewrite the file, by rename, with its whole lines of at most `until` samples."""
    if not path.exists():
        return
    raw = path.read_bytes()
    kept: list[bytes] = []
    for line in raw.splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["samples"] <= until:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the half line of a process that was killed
    if b"".join(kept) != raw:
        partial = path.with_suffix(".part")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, path)
