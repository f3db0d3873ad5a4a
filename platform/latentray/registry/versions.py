"""Releases and aliases: what was promoted, and which of it is live.

Layout of a registry (a URI, local or s3://):
    releases/<id>/...        an artifact of kind `release`: the model's files, report.json, README.md; never changed
    aliases/<alias>.json     {"release": id, "previous": [ids, oldest first], "updated": iso time}

A release's id is derived from the digests of its model and report, so promoting the same twice gives the same release.
Only safetensors, JSON and a few allow-listed files enter: nothing a server could be made to execute.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from latentray.checkpoint import manifest, store
from latentray.checkpoint.manifest import Manifest
from latentray.config.promote import check_alias
from latentray.errors import ArtifactError, InputMissing
from latentray.registry import card
from latentray.registry import report as reports
from latentray.registry.report import EvaluationReport

KIND = "release"
CARD = "README.md"
ALLOWED_SUFFIXES = (".safetensors", ".json", ".png")
ALLOWED_NAMES = ("README.md", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model")
"""Files carried besides: the card, and tokenizer files of other layouts (never parsed by the server)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alias:
    """Where an alias points, and where it pointed before (oldest first)."""

    release: str
    previous: tuple[str, ...] = ()
    updated: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReleaseRow:
    """One release as a table shows it."""

    id: str
    aliases: tuple[str, ...]
    created: str
    metrics: dict[str, float]
    problem: str = ""
    """Why it cannot be read; one damaged release does not hide the others."""


def release_id(model: Manifest, report: EvaluationReport) -> str:
    """`r-` and 12 hex digits of the sha256 over both digests."""
    return "r-" + store.digest_of({"model": model.digest, "report": report.digest})[:12]


def release_uri(registry: str, release: str) -> str:
    return store.join(registry, "releases", release)


def create(model_uri: str, report: EvaluationReport, registry: str, *, license: str = "other") -> str:
    """Copy a verified model with its report and card into the registry; return the release's id.

    Idempotent: where this release exists already it is verified and kept. Raises DigestMismatch for a flipped bit in
    any file of the model, ArtifactError for a file that may not be in a release or a report of another model.
    """
    model, files = manifest.fetch_all(model_uri, kind="model")
    if report.model != model.digest:
        raise ArtifactError("The report is of another model.", where=model_uri, mend="Evaluate this model.")
    for name, path in files.items():
        refuse_unsafe(name, path, where=store.join(model_uri, name))
    release = release_id(model, report)
    uri = release_uri(registry, release)
    if store.exists(store.join(uri, manifest.NAME)):
        manifest.fetch_all(uri, kind=KIND)
        return release
    store.require_space(registry, 2 * sum(entry.size for entry in model.files.values()))
    with store.staging() as folder:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        settings = json.loads(files["config.json"].read_bytes()) if "config.json" in files else {}
        text = card.render(release=release, model=model, settings=settings, report=report, license=license)
        store.write_json(folder / reports.NAME, report.to_json())
        store.write_bytes(folder / CARD, text.encode())
        manifest.publish(
            folder,
            uri,
            kind=KIND,
            inputs={**model.inputs, "model": model.digest, "report": report.digest},
            config=model.config,
            meta=model.meta,
        )
    return release


def refuse_unsafe(name: str, path: Path, *, where: str) -> None:
    """Raise ArtifactError, naming it, for a file that may not be in a release: its name, or content that belies it."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name:
        raise ArtifactError(f"The file name {name!r} leaves the folder.", where=where, mend="Make the model again.")
    if pure.name not in ALLOWED_NAMES and pure.suffix not in ALLOWED_SUFFIXES:
        raise ArtifactError(
            f"The file {name!r} may not be in a release: only safetensors, JSON, PNG and tokenizer files may.",
            where=where,
            mend="Convert weights to safetensors, or leave the file out of the model's folder.",
        )
    try:
        if pure.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                pass
        elif pure.suffix == ".json":
            json.loads(path.read_bytes())
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"The file {name!r} is not what its name says: {error}", where=where, mend="Make the model again."
        ) from None


def verify(registry: str, name: str) -> Manifest:
    """The manifest of a release (by id or alias), every file checked. Raises DigestMismatch naming the file."""
    return manifest.fetch_all(resolve(registry, name)[1], kind=KIND)[0]


def report_of(registry: str, name: str) -> EvaluationReport:
    """The verified evaluation report of a release, by id or alias."""
    uri = resolve(registry, name)[1]
    found = manifest.read(uri, kind=KIND)
    path = manifest.fetch_file(uri, reports.NAME, found)
    return EvaluationReport.from_json(json.loads(path.read_bytes()), where=store.join(uri, reports.NAME))


def read_alias(registry: str, alias: str) -> Alias | None:
    """Where an alias points; None where it was never set."""
    uri = _alias_uri(registry, alias)
    if not store.exists(uri):
        return None
    try:
        raw: Mapping[str, Any] = store.read_json(uri)
        return Alias(release=raw["release"], previous=tuple(raw["previous"]), updated=raw["updated"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ArtifactError(f"The alias file is damaged: {error!r}", where=uri, mend="Promote again.") from None


def resolve(registry: str, name: str) -> tuple[str, str]:
    """(id, URI) of the release an alias or an id names. Raises InputMissing, listing the aliases there are."""
    alias = read_alias(registry, name)
    release = alias.release if alias else name
    uri = release_uri(registry, release)
    if not store.exists(store.join(uri, manifest.NAME)):
        known = ", ".join(aliases(registry)) or "none"
        raise InputMissing(
            f"There is no release {name!r}. Aliases in this registry: {known}.",
            where=registry,
            mend="See them with: python -m jobs.releases; make one with: python -m jobs.promote",
        )
    return release, uri


def move_alias(registry: str, alias: str, release: str) -> Alias:
    """Point an alias at a release; the one it pointed to is remembered for a rollback. Atomic for readers."""
    check_alias(alias)
    resolve(registry, release)
    current = read_alias(registry, alias)
    if current and current.release == release:
        return current
    previous = (*current.previous, current.release) if current else ()
    return _write_alias(registry, alias, release, previous)


def rollback(registry: str, alias: str) -> str:
    """Move an alias back to the release before, once that is verified; return its id.

    Raises InputMissing where there is nothing to go back to, DigestMismatch where the release before is damaged.
    """
    current = read_alias(registry, alias)
    if current is None or not current.previous:
        what = f"{alias!r} has never moved" if current else f"There is no alias {alias!r}"
        raise InputMissing(
            f"{what}: there is no release to go back to.",
            where=registry,
            mend="See the releases with: python -m jobs.releases",
        )
    *older, release = current.previous
    verify(registry, release)
    _write_alias(registry, alias, release, tuple(older))
    return release


def aliases(registry: str) -> dict[str, Alias]:
    """Every alias of a registry, by name."""
    names = [n.removesuffix(".json") for n in store.list_files(store.join(registry, "aliases")) if n.endswith(".json")]
    return {name: found for name in names if (found := read_alias(registry, name))}


def listing(registry: str) -> list[ReleaseRow]:
    """Every committed release, newest first."""
    pointing = aliases(registry)
    rows = []
    for release in store.list_folders(store.join(registry, "releases")):
        names = tuple(name for name, alias in pointing.items() if alias.release == release)
        try:
            found = manifest.find(release_uri(registry, release))
            if found is not None:
                metrics = report_of(registry, release).metrics
                rows.append(ReleaseRow(id=release, aliases=names, created=found.created, metrics=metrics))
        except ArtifactError as error:
            rows.append(ReleaseRow(id=release, aliases=names, created="", metrics={}, problem=error.what))
    return sorted(rows, key=lambda row: (row.created, row.id), reverse=True)


def _alias_uri(registry: str, alias: str) -> str:
    return store.join(registry, "aliases", f"{alias}.json")


def _write_alias(registry: str, alias: str, release: str, previous: tuple[str, ...]) -> Alias:
    updated = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    store.write_json(_alias_uri(registry, alias), {"release": release, "previous": list(previous), "updated": updated})
    return Alias(release=release, previous=previous, updated=updated)
