"""An artifact of ours wherever a setting names a model: what others made, and ids on the hub, become one, once per node.

Beside the path or URI of an artifact, such a setting may name

- a folder in diffusers' layout, local or at a URI: a whole pipeline, or for an autoencoder one that lies alone,
- a single file of CompVis' layout,
- a hub id `owner/name[@revision]` of one of these, or of a repository that holds an artifact of ours.

It is made the artifact that `jobs.import_weights` makes of it, in this node's cache, under its commit or the digest of its
content. So trainer, sampler and server know artifacts alone. The settings are resolved where a job begins, before a cluster
starts; what other nodes or later jobs open is then copied beside the job's output, which they have to reach anyway.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config.import_weights import ImportWeights
from latentray.errors import ArtifactError, ConfigError, FingerprintMismatch, InputMissing
from latentray.interchange import compvis_yaml, diffusers_autoencoders, folders, hub, importing, model_folders
from latentray.models.autoencoder import LatentScale

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
FORMAT = 1
"""Raised where the same weights become another artifact: those that older versions made are not taken for it."""
_PARTS = {"autoencoder": ("vae",), "model": folders.PARTS}
"""Kind of artifact -> the parts of a pipeline that it takes the weights of."""
_DENOISERS = ("unet", "transformer")
_FILES = (".safetensors", ".ckpt")
_CONFIG = "config.json"
_FROM = "from"
"""Below a job's output: copies of what was made for its settings."""


def resolved(config: Settings, kinds: Mapping[str, str], *, beside: str | None = None) -> Settings:
    """The same settings, with artifacts of ours in place of all that is none. Raises as `artifact` does.

    Args:
        kinds: the settings that name models -> the kind of artifact wanted there: autoencoder, model or another of ours.
        beside: a job's output. A copy that an earlier attempt `kept` there goes before what it was made of: a run that goes on
            does so with what it began with, wherever the hub's newest revision is by now. Raises FingerprintMismatch for a
            local folder that was changed since.
    """
    found = {}
    for name, kind in kinds.items():
        source = getattr(config, name)
        if source:
            copy = None if beside is None else _copy_of(source, kind, beside, setting=name)
            found[name] = copy or artifact(source, kind, setting=name)
    return _with(config, found)


def kept(config: Settings, kinds: Mapping[str, str], *, of: Settings, beside: str) -> Settings:
    """Resolved settings, with copies beside a job's output in place of what lies in this node's cache.

    Workers on other nodes can open them, and so can later jobs, when the cache is gone.

    Args:
        of: the settings before they were resolved.
    """
    found = {}
    for name, kind in kinds.items():
        uri, source = getattr(config, name), getattr(of, name)
        if uri != source:
            found[name] = _kept(uri, source, kind, beside)
    return _with(config, found)


def artifact(source: str, kind: str, *, setting: str) -> str:
    """The URI of the artifact that a setting names, made first where it has to be; `source` itself where it is one of ours.

    What is neither ours nor others', such as a path with nothing there, is handed back too: its reader says what is wrong.

    Args:
        kind: autoencoder, model, or another kind of ours, which others have nothing for.
        setting: its name, for errors.

    Raises InputMissing for an id that the hub does not give; ConfigError for a class that latentray does not build, pickled
    weights, and what is no such kind; ArtifactError for weights that do not fit their configuration.
    """
    if not is_others(source):
        return source
    where = f"{setting}={source}"
    path = folders.local(
        _place(source),
        choose=functools.partial(_chosen, kind=kind),
        where=where,
        mend="Check the path, or the id and the network; log in with `hf auth login` where the repository asks for it.",
    )
    if _is_artifact(str(path)):
        return str(path)
    if not _is_theirs(str(path)):
        raise InputMissing(
            "It holds neither a pipeline or autoencoder in diffusers' layout nor an artifact of latentray.",
            where=where,
            mend="Give the id of a repository that does, or of a single file in one: owner/name/file.safetensors.",
        )
    whole = _whole(path, kind)
    return _made(source if whole == path else str(whole), whole, kind, setting)


def is_others(source: str) -> bool:
    """Whether a setting names what is no artifact of ours as it lies there: another layout, or an id on the hub."""
    if hub.is_id(source):
        inside = source.partition("@")[0]
        return inside.count("/") == 1 or inside.endswith(_FILES)
    return _is_theirs(store.absolute(source))


def name_of(source: str) -> str:
    """What a folder made of it is called: `owner--name` of an id, else the last part of the path."""
    known = source.partition("@")[0] if hub.is_id(source) else store.absolute(source).rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]+", "--", known)[:180]


def _with(config: Settings, found: Mapping[str, str]) -> Settings:
    changed: dict[str, Any] = {name: uri for name, uri in found.items() if uri != getattr(config, name)}
    return dataclasses.replace(config, **changed) if changed else config


def _place(source: str) -> str:
    return source if hub.is_id(source) else store.absolute(source)


def _is_artifact(uri: str) -> bool:
    """Whether it is one of ours; not one that was handed out in diffusers' layout, which has a manifest too."""
    return store.exists(store.join(uri, manifest.NAME)) and not store.exists(store.join(uri, folders.INDEX))


def _is_theirs(uri: str) -> bool:
    if store.exists(store.join(uri, folders.INDEX)):
        return True
    if store.exists(store.join(uri, manifest.NAME)):
        return False
    return _class_at(uri) is not None or (uri.endswith(_FILES) and store.exists(uri))


def _class_at(uri: str) -> str | None:
    """diffusers' class of a part that lies alone; None where there is none."""
    where = store.join(uri, _CONFIG)
    try:
        described = store.read_json(where) if store.exists(where) else None
    except ValueError:  # no JSON
        return None
    return described.get("_class_name") if isinstance(described, dict) else None


def _whole(path: Path, kind: str) -> Path:
    """The pipeline's folder where a model is wanted and its denoiser's is named; else the path itself."""
    is_denoiser = kind == "model" and path.name in _DENOISERS
    return path.parent if is_denoiser and (path.parent / folders.INDEX).is_file() else path


def _chosen(names: Sequence[str], kind: str) -> list[str]:
    """Of a folder's files, those that such an artifact is made of; of an artifact of ours all. Raises as `folders.chosen`."""
    if manifest.NAME in names and folders.INDEX not in names:
        return [name for name in names if not name.startswith(".") and not name.endswith(folders.PICKLES)]
    lies_alone = folders.INDEX not in names and _CONFIG in names
    return folders.chosen(names, parts=("",) if lies_alone else _PARTS.get(kind, ()))


def _content(path: Path, kind: str) -> str:
    """sha256 over what is read of a local folder or single file."""
    if path.is_file():
        beside = compvis_yaml.beside(path)
        return store.digest_of([store.sha256_of(one) for one in (path, beside) if one is not None])
    return store.digest_of({name: store.sha256_of(path / name) for name in _chosen(store.list_files(path), kind)})


def _made(source: str, path: Path, kind: str, setting: str) -> str:
    """The artifact of a local folder or file, in this node's cache; made there first where it is not yet, or is cut short."""
    if kind not in _WRITERS:
        raise ConfigError(
            f"A {kind} is wanted here, and there is none in other layouts.",
            where=f"{setting}={source}",
            mend=f"Give the folder, URI or hub id of a {kind} that latentray made.",
        )
    origin = importing.on_hub(source, path)
    content = origin.get("base_commit") or _content(path, kind)
    from_hub = f"{origin['base_model']}@{content}" if origin else name_of(source)
    place = store.cache_dir() / "imported" / str(FORMAT) / kind / f"{name_of(source)}@{content[:40]}"
    with _alone(place):
        if _is_there(place):
            return str(place)
        for left in place.parent.glob(f".partial-{place.name}-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".partial-{place.name}-", dir=place.parent))
        try:
            meta = {"imported_from": from_hub, "content": content} | origin
            _WRITERS[kind](path, source, setting, str(partial), meta)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            print(f"{setting}={source} was made an artifact, once: {place}", flush=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(place)


def _write_autoencoder(path: Path, source: str, setting: str, out: str, meta: Mapping[str, Any]) -> None:
    if path.is_file():
        raise ConfigError(
            "An autoencoder is read from a folder, and this is a single file.",
            where=f"{setting}={source}",
            mend=f"Import it first: python -m jobs.import_weights weights={source} out=<folder>/model parts=<folder>; then "
            f"{setting}=<folder>/autoencoder.",
        )
    found = diffusers_autoencoders.read(path, where=source)
    store.require_space(out, 2 * sum(value.nbytes for value in found.state.values()))
    with store.staging() as scratch:
        scale = LatentScale(shift=found.shift, scale=found.scale)
        build.write_autoencoder(scratch, found.config, found.state, scale=scale, size=found.size)
        manifest.publish(scratch, out, kind="autoencoder", config={"weights": _place(source)}, meta=meta)


def _write_model(path: Path, source: str, setting: str, out: str, meta: Mapping[str, Any]) -> None:
    alone = None if path.is_file() else _class_at(str(path))
    if alone is not None and not (path / folders.INDEX).is_file():
        raise ConfigError(
            f"A whole model is wanted here, and this is {alone} alone.",
            where=f"{setting}={source}",
            mend="Give the folder or hub id of the pipeline that it belongs to.",
        )
    asked = ImportWeights(weights=source, out=out)
    pipeline = importing.read(asked, path)
    model_folders.write(
        pipeline,
        out,
        defaults=importing.defaults_of(asked, pipeline),
        config={"weights": _place(source)},
        meta={**meta, "layout": pipeline.layout.name},
    )


_WRITERS: dict[str, Callable[[Path, str, str, str, Mapping[str, Any]], None]] = {
    "autoencoder": _write_autoencoder,
    "model": _write_model,
}


def _is_there(uri: str | Path) -> bool:
    """Whether an artifact in the cache is whole; what its files hold, its readers verify."""
    try:
        found = manifest.find(uri)
    except ArtifactError:
        return False
    files = {} if found is None else found.files
    paths = {Path(uri) / name: entry.size for name, entry in files.items()}
    return bool(paths) and all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One process of this node at a time works at a place."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.parent / f".{place.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _copy_place(source: str, kind: str, beside: str) -> str:
    return store.join(beside, _FROM, f"{name_of(source)}-{store.digest_of([_place(source), kind])[:8]}")


def _copy_of(source: str, kind: str, beside: str, *, setting: str) -> str | None:
    place = _copy_place(source, kind, beside)
    there = manifest.find(place)
    if there is None:
        return None
    path = None if store.is_remote(source) else Path(store.absolute(source))
    if path is not None and path.exists() and _content(_whole(path, kind), kind) != there.meta.get("content"):
        raise FingerprintMismatch(
            f"It is no longer what {beside} was begun with.",
            where=f"{setting}={source}",
            mend=f"Bring it back as it was, give {setting}={place}, or begin anew with another out=.",
        )
    return place


def _kept(uri: str, source: str, kind: str, beside: str) -> str:
    place = _copy_place(source, kind, beside)
    if uri == place:
        return place
    found = manifest.read(uri)
    with _alone(store.cache_dir() / "imported" / "copies" / store.digest_of(place)[:16]):
        if manifest.find(place) is None:
            store.require_space(place, sum(entry.size for entry in found.files.values()))
            for name in found.files:
                store.upload(manifest.fetch_file(uri, name, found), store.join(place, name))
            store.write_bytes(store.join(place, manifest.NAME), store.read_bytes(store.join(uri, manifest.NAME)))
    return place
