"""Faults that a training run meets at given steps: what a job of `runs.py` may ask for under `inject`."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

from latentray.checkpoint import manifest, store
from latentray.training import loop, partitions
from latentray.training.engine import Engine

_STEP = {"now": -1}
_HELD: list = []


def install(inject: dict) -> list:
    """Put the faults of one job in; what is returned takes them out again."""
    undo = []
    for name, value in inject.items():
        undo += FAULTS[name](value)
    return undo


def _patch(owner: object, name: str, made) -> list:
    before = getattr(owner, name)
    setattr(owner, name, made(before))
    return [lambda: setattr(owner, name, before)]


def _counting(before):
    def step(self, batches, samples, seen, lr):
        _STEP["now"] = samples // self.config.global_batch_size
        return before(self, batches, samples, seen, lr)

    return step


def _losses(factor_at) -> list:
    """Multiply the denoiser's loss, on one rank or all, before its backward pass."""

    def made(before):
        def backward(self, loss):
            return before(self, loss * factor_at(_STEP["now"], dist.get_rank()))

        return backward

    return [*_patch(loop._Loop, "_step", _counting), *_patch(Engine, "backward", made)]


def _nan_at(step: int) -> list:
    return _losses(lambda now, rank: math.nan if now == step and rank == dist.get_world_size() - 1 else 1.0)


def _spike_at(step: int) -> list:
    return _losses(lambda now, rank: 1e4 if now == step else 1.0)


def _infinite(between: list[int]) -> list:
    return _losses(lambda now, rank: math.inf if between[0] <= now < between[1] else 1.0)


def _broken_weights_at(step: int) -> list:
    """Weights that stop being numbers, as a bit flipped in memory makes them: once, before the checkpoint of that step."""
    done = []

    def made(before):
        def save(self, at):
            if at == step and not done:
                done.append(True)
                if self.worker.leads:
                    next(p for p in self.stage.engine.master_partitions() if p.numel()).data.view(-1)[0] = math.nan
            return before(self, at)

        return save

    return _patch(loop._Loop, "_save", made)


def _full_disk(between: list[int]) -> list:
    """No room on the disk while the checkpoints of these steps are written."""

    def made(before):
        def write(path, snapshot):
            if between[0] <= _STEP["now"] < between[1]:
                raise OSError(28, "No space left on device", str(path))
            return before(path, snapshot)

        return write

    return [*_patch(loop._Loop, "_step", _counting), *_patch(partitions, "write", made)]


def _terminated_at(step: int) -> list:
    """SIGTERM to one rank, in its main thread, as Kubernetes sends it to a pod."""

    def made(before):
        def counted(self, batches, samples, seen, lr):
            if samples // self.config.global_batch_size == step and dist.get_rank() == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return before(self, batches, samples, seen, lr)

        return counted

    return _patch(loop._Loop, "_step", made)


def _frozen_at(where: dict) -> list:
    """SIGSTOP to a rank in a step, once its sign of life from that step is out."""

    def made(before):
        def counted(self, batches, samples, seen, lr):
            if samples // self.config.global_batch_size == where["step"] and dist.get_rank() == where["rank"]:
                time.sleep(2.5)
                os.kill(os.getpid(), signal.SIGSTOP)
            return before(self, batches, samples, seen, lr)

        return counted

    return _patch(loop._Loop, "_step", made)


def _dies_while_saving(where: dict) -> list:
    """SIGKILL to every rank at a place of the checkpoint of a step: before its upload, between the ranks', around the manifest,
    in its retention."""
    place, this = where["place"], f"/checkpoints/{where['step']:09d}-"

    def kill_if(now: bool) -> None:
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    def uploads(before):
        def upload(path, uri):
            mine = this in str(uri)
            kill_if(mine and place == "before the upload")
            between = mine and place == "between the ranks"
            if between and dist.get_rank() == 1:
                threading.Event().wait(1.0)  # rank 0 is done by then
                kill_if(True)
            before(path, uri)
            if between:
                threading.Event().wait(2.0)
                kill_if(True)

        return upload

    def jsons(before):
        def write_json(uri, value):
            mine = this in str(uri) and str(uri).endswith(manifest.NAME)
            kill_if(mine and place == "before the manifest")
            if mine and place == "in the manifest":
                _begin(uri, b'{"kind": "check')
                kill_if(True)
            before(uri, value)
            kill_if(mine and place == "after the manifest")

        return write_json

    def deletes(before):
        def delete(uri):
            kill_if("/checkpoints/" in str(uri) and place == "in the retention" and not str(uri).endswith(".json"))
            before(uri)

        return delete

    return [
        *_patch(store, "upload", uploads),
        *_patch(store, "write_json", jsons),
        *_patch(store, "delete", deletes),
    ]


def _begin(uri: str, data: bytes) -> None:
    """What a write leaves that ends in the middle: a file under another name, an upload that nobody completes."""
    if store.is_remote(uri):
        filesystem, key = store.filesystem(uri)
        _HELD.append(filesystem.open_output_stream(key))  # one that is let go completes what it has
        _HELD[-1].write(data)
    else:
        store.local_path(uri).with_name(f".{manifest.NAME}.x.partial").write_bytes(data)


def _preempted_from(step: int) -> list:
    """Ray says from this step on that a node will be taken back."""

    def leaving() -> frozenset[str]:
        return frozenset({"a node"} if _STEP["now"] >= step else ())

    def made(before):
        def told(worker, hooks):
            return before(worker, dataclasses.replace(hooks, leaving=leaving))

        return told

    at_once = _patch(loop, "_ASK_EVERY_S", lambda before: 0.0)
    return [*_patch(loop._Loop, "_step", _counting), *_patch(loop, "run", made), *at_once]


FAULTS = {
    "preempted_from": _preempted_from,
    "nan_at": _nan_at,
    "spike_at": _spike_at,
    "infinite": _infinite,
    "broken_weights_at": _broken_weights_at,
    "full_disk": _full_disk,
    "terminated_at": _terminated_at,
    "frozen_at": _frozen_at,
    "dies_while_saving": _dies_while_saving,
}


def state_of(engine: Engine) -> str:
    """sha256 of this rank's weights, moments and random state; what ZeRO pads its partitions with is none of them."""
    import hashlib

    found = hashlib.sha256()
    held = engine.snapshot()
    for name, tensor in sorted((held.tensors | held.whole).items()):
        found.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    found.update(repr((held.fragments, sorted(held.scalars.items()))).encode())
    found.update(torch.get_rng_state().numpy().tobytes())
    return found.hexdigest()
