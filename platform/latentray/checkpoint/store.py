"""Files at a URI: local disk or S3, one set of verbs.

A URI is a plain path (`runs/a`), `file:///...` or `s3://bucket/key` (endpoint and credentials from the usual AWS
environment variables). Writes are atomic: a local file appears by rename, an object by one PUT. Remote files are read
through a cache of this node (`$LATENTRAY_CACHE`), since no two workers may assume that they share a disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import tenacity
from pyarrow import fs

from latentray.errors import EnvironmentRefused, InputMissing

_RETRY = tenacity.retry(
    retry=tenacity.retry_if_exception(lambda e: isinstance(e, OSError) and not isinstance(e, FileNotFoundError)),
    wait=tenacity.wait_exponential_jitter(multiplier=0.2, max=5.0),
    stop=tenacity.stop_after_attempt(5),
    reraise=True,
)
_TICK_S, _TICK_AT_MOST_S = 0.01, 2.0
"""How often a folder on NFS is touched until its time has moved on, and for how long at most (`_show`)."""
_UNUSABLE = (OSError, ValueError, NotImplementedError)
"""What a store raises that is out, refuses, or is none: pyarrow's ArrowInvalid is a ValueError, and http cannot be written."""


def is_remote(uri: str | Path) -> bool:
    return "://" in str(uri) and not str(uri).startswith("file://")


def local_path(uri: str | Path) -> Path:
    """The path behind a local URI. A remote one is a programming error."""
    assert not is_remote(uri), f"{uri} is not local"
    return Path(str(uri).removeprefix("file://"))


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *(p.strip("/") for p in parts)])


def parent(uri: str | Path) -> str:
    """The folder that holds a file or folder."""
    return str(uri).rstrip("/").rsplit("/", 1)[0]


def absolute(uri: str | Path) -> str:
    """The same URI, valid from any working directory (Ray workers start in their own)."""
    return str(uri) if is_remote(uri) else str(local_path(uri).expanduser().absolute())


_GS_PATIENCE_S = 60


def _remote(uri: str | Path) -> tuple[fs.FileSystem, str]:
    scheme = str(uri).split("://", 1)[0]
    if scheme in ("http", "https"):  # read only; pyarrow has none of its own
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme))), str(uri)
    if scheme in ("gs", "gcs") and "?" not in str(uri):  # without credentials it would try for a quarter of an hour
        uri = f"{uri}?retry_limit_seconds={_GS_PATIENCE_S}"
    filesystem, path = fs.FileSystem.from_uri(str(uri))
    return filesystem, path


def filesystem(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """The pyarrow file system of a URI and the path in it, as Ray Train and pyarrow readers want them."""
    return _remote(uri) if is_remote(uri) else (fs.LocalFileSystem(), absolute(uri))


def exists(uri: str | Path) -> bool:
    """Whether there is a file or folder now, also where another node made it just before."""
    if not is_remote(uri):
        there = local_path(uri)
        _look_anew(there.parent)
        return there.exists()
    filesystem, path = _remote(uri)
    return filesystem.get_file_info(path).type is not fs.FileType.NotFound


def _look_anew(folder: Path) -> None:
    """Have an NFS client ask its server what is in a folder.

    For half a minute and more it believes what it remembers, also that a file is not there, however often that is looked for.
    Opening the folder makes it ask (close-to-open consistency, nfs(5)); of a local disk that costs microseconds.
    """
    try:
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    except FileNotFoundError:
        if folder.parent == folder:
            return
        _look_anew(folder.parent)
        with contextlib.suppress(OSError):
            os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
    except OSError:  # no folder, or one that may not be listed: what is done with it will say so
        pass


@_RETRY
def read_bytes(uri: str | Path) -> bytes:
    """The whole file. Raises InputMissing where there is none."""
    try:
        if not is_remote(uri):
            there = local_path(uri)
            _look_anew(there.parent)
            return there.read_bytes()
        filesystem, path = _remote(uri)
        with filesystem.open_input_stream(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise InputMissing("The file is not there.", where=str(uri), mend="Check the path.") from None


def read_range(uri: str | Path, offset: int, length: int) -> bytes:
    """`length` bytes at `offset` of a remote file, by one request that is not tried again.

    Raises FileNotFoundError where there is no file, EOFError where it ends before, OSError where it cannot be read, within
    half a minute.
    """
    try:
        file = _ranged(str(uri))
        if offset + length > file.size():
            raise EOFError(f"{uri} has {file.size()} bytes")
        return file.read_at(length, offset)
    except BaseException:
        _ranged.cache_clear()  # a handle of a connection that failed
        raise


@functools.lru_cache(maxsize=64)
def _ranged(uri: str) -> Any:
    """A remote file opened for ranged reads: it asks for the file's size once, not with every range."""
    filesystem, path = _remote(uri)
    if isinstance(filesystem, fs.S3FileSystem):  # its own has no limit of time, and tries again where nobody counts
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        filesystem = fs.S3FileSystem(
            region=filesystem.region,
            endpoint_override=endpoint,
            connect_timeout=5,
            request_timeout=25,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        )
    return filesystem.open_input_file(path)


@_RETRY
def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write the whole file, atomically: a reader sees the old content or the new, never a part."""
    if not is_remote(uri):
        _place(local_path(uri), lambda partial: partial.write_bytes(data))
        return
    filesystem, key = _remote(uri)
    with filesystem.open_output_stream(key) as stream:
        stream.write(data)


def _place(path: Path, write: Callable[[Path], object]) -> None:
    """Have a local file written beside its place, and rename it there."""
    _make(path.parent)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _show(path.parent)


def _make(folder: Path) -> None:
    """Make a folder and what it lies in, where they are not there."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _show(folder.parent)


def _show(folder: Path) -> None:
    """Have other NFS clients learn that a folder was changed; nothing is done on a local disk.

    They see it by the folder's time, which moves in ticks of up to ten milliseconds on many servers. A client that looked
    between two changes of one tick never learns of the second, so the folder is touched until its time has moved on.
    """
    try:
        if not _is_nfs(os.stat(folder).st_dev):
            return
        os.utime(folder)  # its answer tells the server's time: a cached one may be older than the change
        changed, until = os.stat(folder).st_mtime_ns, time.monotonic() + _TICK_AT_MOST_S
        while os.stat(folder).st_mtime_ns == changed and time.monotonic() < until:
            time.sleep(_TICK_S)
            os.utime(folder)
    except OSError:  # it was removed meanwhile, or is another user's: the file is there all the same
        pass


@functools.lru_cache(maxsize=64)
def _is_nfs(device: int) -> bool:
    """Whether a device (`st_dev`) is a mount of NFS. Linux tells; elsewhere none is."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(one.split()[2] == number and one.split(" - ", 1)[1].startswith("nfs") for one in mounts)


def read_json(uri: str | Path) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str | Path, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def list_files(uri: str | Path) -> list[str]:
    """Names of all files below a folder, relative to it, sorted; empty where the folder is not there."""
    if not is_remote(uri):
        root = local_path(uri)
        _look_anew(root)
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    filesystem, path = _remote(uri)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = path.rstrip("/") + "/"
    return sorted(i.path.removeprefix(prefix) for i in infos if i.type is fs.FileType.File)


def list_folders(uri: str | Path) -> list[str]:
    """Names of the folders directly below a folder, sorted; on a disk those that hold nothing too."""
    if not is_remote(uri):
        root = local_path(uri)
        _look_anew(root)
        return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    return sorted({name.split("/", 1)[0] for name in list_files(uri) if "/" in name})


@_RETRY
def upload(local_file: Path, uri: str | Path) -> None:
    """Copy a local file to a URI, atomically."""
    if not is_remote(uri):
        _place(local_path(uri), lambda partial: shutil.copyfile(local_file, partial))
        return
    filesystem, path = _remote(uri)
    with open(local_file, "rb") as source, filesystem.open_output_stream(path) as sink:
        shutil.copyfileobj(source, sink, 4 << 20)


def settle(path: Path) -> None:
    """Return once what was written to a local file lies where a node that dies does not take it along; nothing without one."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cache_dir() -> Path:
    """This node's cache of remote files: `$LATENTRAY_CACHE`, else one below the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "latentray"
    return Path(os.environ.get("LATENTRAY_CACHE", default))


@_RETRY
def fetch(uri: str | Path, *, sha256: str | None = None) -> Path:
    """A local path with the file's content: the file itself where it is local, this node's cached copy where not.

    The cache is keyed by URI and, where given, digest, so an artifact's file is downloaded once per node. A copy whose
    digest is not `sha256` is not kept; the caller's verification names it.
    """
    if not is_remote(uri):
        return local_path(uri)
    key = hashlib.sha256(f"{uri}\0{sha256 or uuid.uuid4().hex}".encode()).hexdigest()[:32]
    target = cache_dir() / key[:2] / key / str(uri).rsplit("/", 1)[-1]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")
    filesystem, path = _remote(uri)
    try:
        with filesystem.open_input_stream(path) as source, open(partial, "wb") as sink:
            shutil.copyfileobj(source, sink, 4 << 20)
        if sha256 is None or sha256_of(partial) == sha256:
            partial.replace(target)
            return target
        damaged = target.with_name(f"damaged-{uuid.uuid4().hex[:8]}")
        partial.replace(damaged)
        return damaged
    except FileNotFoundError:
        raise InputMissing("The file is not there.", where=str(uri), mend="Check the URI.") from None
    finally:
        partial.unlink(missing_ok=True)


def delete(uri: str | Path) -> None:
    """Delete a file, or a folder with all it holds; silent where there is nothing."""
    if not is_remote(uri):
        path = local_path(uri)
        _look_anew(path.parent)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return
    filesystem, key = _remote(uri)
    info = filesystem.get_file_info(key)
    if info.type is fs.FileType.Directory:
        filesystem.delete_dir(key)
    elif info.type is fs.FileType.File:
        filesystem.delete_file(key)


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """A folder on this node's disk to build files in before they are uploaded; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="latentray-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON: the fingerprint of configurations and of lists of digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def require_space(uri: str | Path, need_bytes: int, *, mend: str = "") -> None:
    """Refuse a local target whose disk has less than `need_bytes` free (EnvironmentRefused)."""
    if is_remote(uri):
        return
    folder = local_path(uri).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise EnvironmentRefused(
            f"The disk is too full: {free / 2**20:.0f} MiB free, about {need_bytes / 2**20:.0f} MiB needed.",
            where=str(folder),
            mend=mend or "Free some space, or send the output elsewhere with out=<path or s3 URI>.",
        )


def require_reachable(uri: str | Path) -> None:
    """Raise EnvironmentRefused where a URI cannot be looked at: its scheme is not known, its store gives no answer."""
    try:
        exists(uri)
    except _UNUSABLE as error:
        raise _unusable(uri, error) from None


def require_writable(uri: str | Path) -> None:
    """Raise EnvironmentRefused where nothing can be written below a URI. A small file is written and deleted to see it."""
    try:
        if is_remote(uri):
            filesystem, path = _remote(join(uri, f".probe-{uuid.uuid4().hex[:8]}"))
            with filesystem.open_output_stream(path) as stream:
                stream.write(b"probe")
            filesystem.delete_file(path)
            return
        folder = local_path(uri).absolute()
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except _UNUSABLE as error:
        raise _unusable(uri, error) from None


def _unusable(uri: str | Path, error: Exception) -> EnvironmentRefused:
    why = next(iter(str(error).splitlines()), type(error).__name__)
    return EnvironmentRefused(
        f"Nothing can be written there: {why}",
        where=str(uri),
        mend="Give out=<path or s3 URI> that can be written; `python -m jobs.doctor storage=<it>` tells more.",
    )


def require_readable(uris: Iterable[str | Path]) -> None:
    """Raise InputMissing for the first URI that is not there."""
    for uri in uris:
        if not exists(uri):
            raise InputMissing("The input is not there.", where=str(uri), mend="Check the path.")
