"""Checkpoints of a run: every rank copies its part and goes on; a thread writes it, and rank 0's writes the manifest last.

Layout: `<run>/checkpoints/<step>-<attempt>/<engine>/rank_<r>.safetensors`, `rank_<r>.json` (what that rank wrote) and
`manifest.json`. The newest valid one is found by listing manifests; a folder without one, of a dead attempt, is never read.
No file is a pickle, and none depends on the world size or ZeRO stage that wrote it (`partitions.py`).
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.train import Train
from latentray.errors import ArtifactError, DigestMismatch, FingerprintMismatch, StorageFailed
from latentray.training import partitions
from latentray.training.ema import EMA
from latentray.training.engine import Engine
from latentray.training.partitions import Pieces, Snapshot
from latentray.training.state import Worker
from latentray.training.writer import Writer

KIND = "checkpoint"
FORMAT = 2
"""Of the files of a checkpoint."""
PINNED = "pinned.json"
"""A file of this name in a checkpoint's folder keeps it for good."""
COMPARED = (
    "stage", "autoencoder", "denoiser", "objective", "optimizer", "precision", "size", "crop", "flip", "ema_half_life_samples",
)  # fmt: skip
"""Parts of the configuration that a run must not change on its way, unless `resume.allow` names them."""
_PATIENCE_S = 1800.0
_POLL_S = 0.2


@dataclasses.dataclass(kw_only=True)
class Saved:
    """A checkpoint that was found: where, and the cursor of the step to do next."""

    uri: str
    manifest: manifest.Manifest

    @property
    def step(self) -> int:
        return int(self.manifest.meta["cursor"]["step"])

    @property
    def cursor(self) -> dict[str, Any]:
        return self.manifest.meta["cursor"]

    @property
    def samples(self) -> int:
        """Samples that the run had seen."""
        return int(self.manifest.meta["samples"])

    @property
    def clock(self) -> dict[str, Any]:
        """What the run's time went into up to here (`clock.py`)."""
        return self.manifest.meta["clock"]

    @property
    def faults(self) -> dict[str, Any]:
        """What the run had seen of losses and dropped steps (`guard.py`); nothing in one from before that was kept."""
        return self.manifest.meta.get("faults", {})

    def parts(self, engine: str) -> list[str]:
        """The files of one engine, by rank."""
        return sorted(name for name in self.manifest.files if name.startswith(f"{engine}/"))


class Checkpoints:
    """Saves and restores the state of one worker. Every method is collective unless it says otherwise."""

    def __init__(self, worker: Worker, engines: Mapping[str, Engine], ema: EMA, *, inputs: Mapping[str, str]) -> None:
        self.worker, self.engines, self.ema, self.inputs = worker, dict(engines), ema, dict(inputs)
        self._writer = Writer()
        self._given_up = threading.Event()
        self.failures = 0
        """Checkpoints in a row before the one that was begun last that could not be written, by the rank that failed most, or
        were left out."""
        self._left_out = 0
        """Checkpoints in a row, up to now, for which the one before was still being written."""
        self.stalled_s = 0.0
        """Seconds that the loop stood still for checkpoints."""
        self.written_at: float | None = None
        """When this rank's part of the last one was written, by time.time()."""

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of the last one, or as rank 0 the manifest. Not collective."""
        return self._writer.failures > 0

    def give_up(self) -> None:
        """Another rank could not write its part: this rank does not wait for it any longer. Not collective."""
        self._given_up.set()

    def save(
        self,
        *,
        cursor: Mapping[str, Any],
        samples: int,
        clock: Mapping[str, Any],
        faults: Mapping[str, Any],
        first: Callable[[], None],
    ) -> str | None:
        """Copy the state and let it be written, by a thread that does `first` before; the URI where it will be.

        Waits for the one before, `faults.patience_s` at most; None, and nothing is copied, where it is not written then.
        """
        begun = time.perf_counter()
        patience = 0.0 if self._left_out else self.worker.config.faults.patience_s
        is_busy = not self._writer.wait(patience)
        told = torch.tensor([self._writer.failures, is_busy], dtype=torch.int64, device=self.worker.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        failures, is_one_busy = told.tolist()
        self._left_out = self._left_out + 1 if is_one_busy else 0
        self.failures = failures + self._left_out
        if is_one_busy:
            self.stalled_s += time.perf_counter() - begun
            return None
        snapshots = {name: self._snapshot(name, engine) for name, engine in self.engines.items()}
        worker = self.worker
        uri = store.join(_root(worker.out), f"{int(cursor['step']):09d}-{worker.attempt}")
        meta = {
            "format": FORMAT,
            "cursor": dict(cursor),
            "samples": samples,
            "clock": dict(clock),
            "faults": dict(faults),
            "world": worker.world,
            "zero_stage": worker.config.deepspeed.zero_stage,
        }
        self._given_up.clear()

        def write() -> None:
            first()
            self._write(uri, snapshots, meta)

        self._writer.start(write)
        self.stalled_s += time.perf_counter() - begun
        return uri

    def wait(self) -> None:
        """Until what was saved is written. Not collective."""
        begun = time.perf_counter()
        self._writer.wait()
        self.stalled_s += time.perf_counter() - begun

    def restore(self) -> Saved | None:
        """Load the newest checkpoint whose every file matches its manifest; None where the run has none.

        A damaged one is named on standard output and passed over. Raises ArtifactError where all are damaged, rather than to
        begin again; FingerprintMismatch where the run began with other settings.
        """
        self.wait()
        found: list[list[Saved] | ArtifactError] = [_found(self.worker.out) if self.worker.leads else []]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], ArtifactError):
            raise found[0]
        for saved in found[0]:
            require_like(saved, compose.to_dict(self.worker.config), self.inputs, self.worker.config.resume.allow)
            paths = self._fetch(saved)
            if paths is not None:
                self._load(paths)
                if store.is_remote(saved.uri):
                    _drop_copies(paths)
                return saved
        if found[0]:
            raise _all_damaged(self.worker.out, len(found[0]))
        return None

    # ---- what the threads and ranks do

    def _snapshot(self, name: str, engine: Engine) -> Snapshot:
        return self.ema.snapshot() if engine is self.ema.engine else engine.snapshot()

    def _write(self, uri: str, snapshots: Mapping[str, Snapshot], meta: Mapping[str, Any]) -> None:
        """In the thread: this rank's files, then what they are; on rank 0, once all ranks are there, the manifest."""
        worker = self.worker
        with store.staging() as folder:
            for name, snapshot in snapshots.items():
                partitions.write(folder / name / f"rank_{worker.rank:05d}.safetensors", snapshot)
            entries = {
                p.relative_to(folder).as_posix(): manifest.entry_of(p) for p in sorted(folder.rglob("*")) if p.is_file()
            }
            for name in entries:
                store.upload(folder / name, store.join(uri, name))
        listed = {name: dataclasses.asdict(entry) for name, entry in entries.items()}
        store.write_json(_listing(uri, worker.rank), listed)
        if worker.leads:
            files = self._gathered(uri)
            config = compose.to_dict(worker.config)
            manifest.seal(uri, files, kind=KIND, inputs=self.inputs, config=config, meta=meta)
            retain(worker.out, keep=worker.config.keep_checkpoints, attempt=worker.attempt)
        self.written_at = time.time()

    def _gathered(self, uri: str) -> dict[str, manifest.FileEntry]:
        """What all ranks wrote. Raises StorageFailed where one of them did not come to its end."""
        files: dict[str, manifest.FileEntry] = {}
        until = time.monotonic() + _PATIENCE_S
        for rank in range(self.worker.world):
            where = _listing(uri, rank)
            while not store.exists(where):
                if self._given_up.is_set() or time.monotonic() > until:
                    raise StorageFailed(
                        f"Rank {rank} did not write its part.", where=uri, mend="See that rank's output."
                    )
                time.sleep(_POLL_S)
            files |= {name: manifest.FileEntry(**entry) for name, entry in store.read_json(where).items()}
            store.delete(where)
        return files

    def _fetch(self, saved: Saved) -> dict[str, list[Path]] | None:
        """Verified local paths of all parts; None, on all ranks alike, where one of them is damaged."""
        problem, paths = "", {}
        try:
            for name in self.engines:
                paths[name] = [manifest.fetch_file(saved.uri, part, saved.manifest) for part in saved.parts(name)]
                if len(paths[name]) != saved.manifest.meta["world"]:
                    problem = (
                        f"{saved.uri} has {len(paths[name])} parts of {name!r}, not {saved.manifest.meta['world']}"
                    )
        except ArtifactError as error:
            problem = str(error)
        problems: list[str] = [""] * self.worker.world
        dist.all_gather_object(problems, problem)
        first = next(filter(None, problems), "")
        if first and self.worker.leads:
            print(f"checkpoint passed over: {first}", flush=True)
        return None if first else paths

    def _load(self, paths: Mapping[str, list[Path]]) -> None:
        for name, engine in self.engines.items():
            pieces = Pieces(paths[name])
            engine.restore(pieces)
            if engine is self.ema.engine:
                self.ema.restore(pieces)
        dist.barrier()


def _drop_copies(paths: Mapping[str, list[Path]]) -> None:
    """Delete files from this node's cache: they are as large as the run's state, and read once."""
    for path in (path for some in paths.values() for path in some):
        path.unlink(missing_ok=True)  # of the ranks on this node one is first


def _found(out: str) -> list[Saved] | ArtifactError:
    """What rank 0 tells the others: the checkpoints, or why there is none to go on from."""
    try:
        return require_sound(out)
    except ArtifactError as error:
        return error


def _all_damaged(out: str, count: int) -> ArtifactError:
    return ArtifactError(
        f"All {count} checkpoints of the run are damaged.",
        where=_root(out),
        mend="Restore one from a copy; to begin again from the start, choose another run=... or delete them.",
    )


def candidates(out: str) -> list[Saved]:
    """Every checkpoint with a manifest, newest first; one whose manifest is damaged is named and left out."""
    return _listed(out)[0]


def require_sound(out: str) -> list[Saved]:
    """`candidates`. Raises ArtifactError where all manifests are damaged: the run must not begin again unasked."""
    found, damaged = _listed(out)
    if damaged and not found:
        raise _all_damaged(out, len(damaged))
    return found


def _listed(out: str) -> tuple[list[Saved], list[str]]:
    """Checkpoints, newest first, and the names of those whose manifest is damaged."""
    found, damaged = [], []
    root = _root(out)
    for name in store.list_folders(root):
        uri = store.join(root, name)
        try:
            listing = manifest.find(uri)
        except DigestMismatch as error:
            print(f"checkpoint passed over: {error}", flush=True)
            damaged.append(name)
            continue
        if listing is not None:
            found.append(Saved(uri=uri, manifest=listing))
    # By samples: where other data go on (`resume.allow=[data]`), a step may be of more samples than before.
    return sorted(found, key=lambda saved: (saved.samples, saved.manifest.created), reverse=True), damaged


def require_like(saved: Saved, config: Mapping[str, Any], inputs: Mapping[str, str], allow: list[str]) -> None:
    """Raise FingerprintMismatch where a checkpoint is of another format, of other data, or of other settings that matter.

    World size and ZeRO stage may differ. What `allow` names (`optimizer`, `optimizer.lr`, `data`) may differ too. Another
    commit is only told, and a setting that the one then did not have yet had its default.
    """
    meta, then = saved.manifest.meta, _filled(saved.manifest.config, compose.to_dict(Train()))
    if meta.get("format") != FORMAT:
        raise FingerprintMismatch(
            f"The checkpoint has format {meta.get('format')}; this version reads format {FORMAT}.",
            where=saved.uri,
            mend="Resume with the version of latentray that wrote it, or begin a new run.",
        )
    differing = [
        f"{key}: {before} then, {now} now"
        for part in COMPARED
        for key, before, now in _differences(part, then.get(part), config.get(part))
        if not _is_allowed(key, allow)
    ]
    differing += [
        f"data: {role} {saved.manifest.inputs[role][:12]} then, {inputs.get(role, 'none')[:12]} now"
        for role in sorted(saved.manifest.inputs)
        if saved.manifest.inputs[role] != inputs.get(role) and "data" not in allow
    ]
    if differing:
        keys = ",".join(dict.fromkeys(line.split(":", 1)[0] for line in differing))
        raise FingerprintMismatch(
            "The run was begun with other settings:\n    " + "\n    ".join(differing),
            where=saved.uri,
            mend=f"Resume with the settings it began with, begin a new run, or allow it: resume.allow=[{keys}].",
        )


def _differences(key: str, before: Any, now: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            found
            for name in sorted({**before, **now})
            for found in _differences(f"{key}.{name}", before.get(name), now.get(name))
        ]
    return [] if before == now else [(key, before, now)]


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, with the defaults of what they do not name."""
    return {
        key: _filled(values[key], default)
        if isinstance(default, Mapping) and isinstance(values.get(key), Mapping)
        else values.get(key, default)
        for key, default in {**values, **defaults}.items()
    }


def _is_allowed(key: str, allow: list[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in allow)


def retain(out: str, *, keep: int, attempt: str) -> None:
    """Keep the newest `keep` checkpoints and pinned ones, and remove what has no manifest: what dead attempts left, what could
    not be written to its end, and what could not be removed before (NFS keeps a file that somebody reads). One whose manifest is
    damaged is dropped once it would be without that.

    A dropped checkpoint loses its manifest first, so that it is never seen in part.
    """
    root = _root(out)
    sealed, damaged = _listed(out)
    oldest = _name(sealed[keep - 1]) if len(sealed) >= keep > 0 else ""
    dropped = [saved.uri for saved in sealed[keep:]] + [store.join(root, name) for name in damaged if name < oldest]
    for uri in dropped:
        if not store.exists(store.join(uri, PINNED)):
            store.delete(store.join(uri, manifest.NAME))
            store.delete(uri)
    kept = {saved.uri for saved in sealed}
    for name in store.list_folders(root):
        uri = store.join(root, name)
        under_way = name.endswith(f"-{attempt}") and not (sealed and name < _name(sealed[0]))
        if uri not in kept and not under_way and not store.exists(store.join(uri, manifest.NAME)):
            store.delete(uri)


def _name(saved: Saved) -> str:
    """Of its folder: names are in the order of steps."""
    return saved.uri.rsplit("/", 1)[-1]


def _root(out: str) -> str:
    return store.join(out, "checkpoints")


def _listing(uri: str, rank: int) -> str:
    return store.join(uri, f"rank_{rank:05d}.json")


def is_finite(engines: Mapping[str, Engine], ema: EMA, device: torch.device) -> bool:
    """Whether weights and average are numbers on all ranks: what must hold of a checkpoint. Collective."""
    flats = [
        p.detach() for engine in engines.values() for p in engine.master_partitions() if p.numel()
    ] + ema.partitions
    norms = torch.stack([torch.linalg.vector_norm(flat.float()).to(device) for flat in flats if flat.numel()])
    bad = (~norms.isfinite()).any().float()
    dist.all_reduce(bad)
    return not bool(bad)
