"""What W&B's own files of a run hold: how far its history reaches, so that an attempt goes on where another ended.

A `.wandb` file is LevelDB's log format: 7 bytes of its own, then blocks of 32 KiB with fragments of records. A fragment is
checksum (4), length (2), type (1: whole, 2: first, 3: middle, 4: last) and data.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEADER, _TAIL_BLOCKS = 32768, 7, 32
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def folders(run_folder: Path, run_id: str, *, offline: bool) -> list[str]:
    """W&B's folders of a run's attempts, oldest first."""
    name = f"{'offline-run' if offline else 'run'}-*-{glob.escape(run_id)}"
    return sorted(glob.glob(os.path.join(glob.escape(str(run_folder.absolute())), "wandb", name)))


def last_step(run_folder: Path, run_id: str) -> int:
    """The highest step of history that attempts recorded, offline or online; -1 where there is none."""
    found = [one for offline in (True, False) for one in folders(run_folder, run_id, offline=offline)]
    return max((_last_step(path) for folder in found for path in Path(folder).glob("*.wandb")), default=-1)


def _last_step(path: Path) -> int:
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    tail = max(len(data) // _BLOCK - _TAIL_BLOCKS, 0) * _BLOCK
    for start in dict.fromkeys((tail, 0)):  # history stands in the last megabyte, but for the oddest runs
        found = -1
        for raw in _records(data, start):
            record = wandb_internal_pb2.Record()
            try:
                record.ParseFromString(raw)
            except DecodeError:
                continue
            if record.HasField("history"):
                found = max(found, record.history.step.num)
        if found >= 0:
            return found
    return -1


def _records(data: bytes, start: int) -> Iterator[bytes]:
    """The whole records from a block's beginning on; one that is cut at either end is left out."""
    at, begun = max(start, _HEADER), False
    parts: list[bytes] = []
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part = data[at + _HEADER : at + _HEADER + length]
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or len(part) < length:
            return
        if kind in (_WHOLE, _FIRST):
            parts, begun = [], True
        parts.append(part)
        if kind in (_WHOLE, _LAST):
            if begun:
                yield b"".join(parts)
            begun = False
        at += _HEADER + length
