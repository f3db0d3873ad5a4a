"""The manifest of an artifact: what a folder is, which files it holds, and what it was made from.

An artifact is a folder at a URI whose `manifest.json` was written last. A folder without one does not exist for any
reader; a file whose sha256 differs from the manifest is refused by name.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentray.checkpoint import store
from latentray.errors import AlreadyExists, ArtifactError, DigestMismatch, InputMissing

NAME = "manifest.json"
FORMAT = 1
_PACKAGES = ("latentray", "torch", "ray", "deepspeed", "webdataset", "transformers", "lpips", "hydra-core", "wandb")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size in bytes and sha256 of one file of an artifact."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `manifest.json` holds."""

    kind: str
    """What the folder is: `dataset`, `autoencoder`, `latents`, `checkpoint`, `model`, `report`, `release`, `run` ..."""
    files: dict[str, FileEntry]
    """Every file of the artifact, by its name relative to the folder."""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    """Digest of each artifact this one was made from, by role (`dataset`, `autoencoder`, ...): the lineage."""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The job's resolved configuration."""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What a reader of this kind needs to know beyond the files."""
    created: str = ""
    git_commit: str = ""
    packages: dict[str, str] = dataclasses.field(default_factory=dict)
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """sha256 over kind, files, inputs and meta: equal content gives an equal digest, whenever and wherever made."""
        files = {name: entry.sha256 for name, entry in self.files.items()}
        return store.digest_of({"kind": self.kind, "files": files, "inputs": self.inputs, "meta": self.meta})


def entry_of(path: Path) -> FileEntry:
    return FileEntry(size=path.stat().st_size, sha256=store.sha256_of(path))


def publish(
    folder: Path,
    uri: str | Path,
    *,
    kind: str,
    inputs: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Manifest:
    """Upload a local folder as an artifact: every file first, the manifest last.

    Raises AlreadyExists where a committed artifact stands at `uri`, unless `replace` is set.
    """
    files = {p.relative_to(folder).as_posix(): entry_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    refuse_existing(uri, replace=replace)
    for name in files:
        store.upload(folder / name, store.join(uri, name))
    return seal(uri, files, kind=kind, inputs=inputs, config=config, meta=meta)


def seal(
    uri: str | Path,
    files: Mapping[str, FileEntry],
    *,
    kind: str,
    inputs: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the manifest of files that are already in place (written and hashed by workers, say)."""
    manifest = Manifest(
        kind=kind,
        files=dict(sorted(files.items())),
        inputs=dict(inputs or {}),
        config=dict(config or {}),
        meta=dict(meta or {}),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        git_commit=git_commit(),
        packages=_package_versions(),
    )
    values = dataclasses.asdict(manifest) | {"digest": manifest.digest}
    store.write_json(store.join(uri, NAME), values | {"checksum": store.digest_of(values)})
    return manifest


def refuse_existing(uri: str | Path, *, replace: bool = False) -> None:
    """Raise AlreadyExists where a committed artifact stands at `uri`; with `replace`, un-commit it instead."""
    where = store.join(uri, NAME)
    if not store.exists(where):
        return
    if not replace:
        raise AlreadyExists(
            "There is a finished artifact already; artifacts are never overwritten.",
            where=str(uri),
            mend="Choose another out=..., or delete that folder first.",
        )
    store.delete(where)


def read(uri: str | Path, *, kind: str | None = None) -> Manifest:
    """The manifest at a URI.

    Raises InputMissing without one, DigestMismatch where it was damaged, ArtifactError where kind or format differ.
    """
    where = store.join(uri, NAME)
    try:
        raw = store.read_json(where)
    except InputMissing:
        wanted = kind or "artifact"
        raise InputMissing(
            f"No finished {wanted} is there: the folder has no {NAME}.",
            where=str(uri),
            mend="Check the path; if the job that makes it was cut short, run it again.",
        ) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise _damaged(where, str(error)) from None
    if not isinstance(raw, dict):
        raise _damaged(where, "no JSON object")
    checksum = raw.pop("checksum", None)
    if checksum is not None and store.digest_of(raw) != checksum:
        raise _damaged(where, "it was changed after it was written")
    if raw.get("format") != FORMAT:
        raise ArtifactError(
            f"The manifest has format {raw.get('format')!r}; this version reads format {FORMAT}.",
            where=where,
            mend="Use the version of latentray that wrote it, or make the artifact again.",
        )
    try:
        recorded = raw.pop("digest")
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        manifest = Manifest(files=files, **raw)
    except (AttributeError, KeyError, TypeError) as error:  # a key is missing, unknown, or holds another type
        raise _damaged(where, str(error)) from None
    if manifest.digest != recorded:
        raise _damaged(where, "it was changed after it was written")
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(
            f"{'An' if kind[0] in 'aeiou' else 'A'} {kind} is wanted here, and this is a {manifest.kind}.",
            where=str(uri),
            mend="Give the path of another folder.",
        )
    return manifest


def _damaged(where: str, why: str) -> DigestMismatch:
    return DigestMismatch(f"The manifest is damaged: {why}.", where=where, mend="Make the artifact again.")


def find(uri: str | Path) -> Manifest | None:
    """The manifest at a URI, or None where no artifact was committed."""
    try:
        return read(uri) if store.exists(store.join(uri, NAME)) else None
    except InputMissing:  # it was deleted meanwhile, by another node's retention perhaps
        return None


def fetch_file(uri: str | Path, name: str, manifest: Manifest) -> Path:
    """A verified local path of one file of an artifact. Raises DigestMismatch naming it, ArtifactError if not listed."""
    entry = manifest.files.get(name)
    where = store.join(uri, name)
    if entry is None:
        raise ArtifactError(f"The manifest lists no file {name!r}.", where=str(uri), mend="Make the artifact again.")
    missing = DigestMismatch(
        "A file of the artifact is missing.", where=where, mend="Restore it, or make the artifact again."
    )
    try:
        path = store.fetch(where, sha256=entry.sha256)
    except InputMissing:
        raise missing from None
    if not store.exists(path):
        raise missing
    got = store.sha256_of(path)
    if got != entry.sha256:
        raise DigestMismatch(
            f"A file differs from its manifest: sha256 {got[:12]}, recorded {entry.sha256[:12]}.",
            where=where,
            mend="Restore the file from a good copy, or make the artifact again.",
        )
    return path


def fetch_all(uri: str | Path, *, kind: str | None = None) -> tuple[Manifest, dict[str, Path]]:
    """The manifest and a verified local path for every file it lists."""
    manifest = read(uri, kind=kind)
    return manifest, {name: fetch_file(uri, name, manifest) for name in manifest.files}


def git_commit() -> str:
    """The commit of the checkout that runs; empty outside one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
