"""The store: the same verbs on local disk and on S3, atomic writes, and a cache that keeps no damaged copy."""

import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import time
import types
from pathlib import Path

import pytest

from latentray.checkpoint import manifest, store
from latentray.errors import EnvironmentRefused, InputMissing


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "root")
    return request.getfixturevalue("moto_s3").uri("root")


def test_read_write_list_delete(root):
    one, two = store.join(root, "a", "one.bin"), store.join(root, "a/b", "two.json")
    assert not store.exists(one)
    assert store.list_files(root) == []
    store.write_bytes(one, b"\x00\xff")
    store.write_json(two, {"x": [1, None]})
    assert store.exists(one)
    assert store.read_bytes(one) == b"\x00\xff"
    assert store.read_json(two) == {"x": [1, None]}
    assert store.list_files(root) == ["a/b/two.json", "a/one.bin"]
    assert store.list_folders(root) == ["a"]
    assert store.list_folders(store.join(root, "a")) == ["b"]
    store.write_bytes(one, b"again")
    assert store.read_bytes(one) == b"again"
    store.delete(one)
    assert store.list_files(root) == ["a/b/two.json"]
    store.delete(store.join(root, "a"))
    assert store.list_files(root) == []
    store.delete(store.join(root, "a"))  # nothing there: silent


def test_what_is_missing_is_named(root):
    where = store.join(root, "nothing.json")
    with pytest.raises(InputMissing) as caught:
        store.read_bytes(where)
    assert caught.value.where == where
    with pytest.raises(InputMissing) as caught:
        store.require_readable([where])
    assert caught.value.where == where


def test_upload_and_fetch(root, tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"content" * 1000)
    where = store.join(root, "deep", "source.bin")
    store.upload(source, where)
    path = store.fetch(where, sha256=store.sha256_of(source))
    assert path.read_bytes() == source.read_bytes()
    assert path.name == "source.bin"


def test_a_remote_file_is_downloaded_once(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    where, digest = moto_s3.uri("x.bin"), hashlib.sha256(b"x").hexdigest()
    store.write_bytes(where, b"x")
    first = store.fetch(where, sha256=digest)
    store.delete(where)
    assert store.fetch(where, sha256=digest) == first
    assert first.read_bytes() == b"x"


def test_a_damaged_download_is_not_kept(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    where, digest = moto_s3.uri("x.bin"), hashlib.sha256(b"good").hexdigest()
    store.write_bytes(where, b"gOod")
    assert store.sha256_of(store.fetch(where, sha256=digest)) != digest
    store.write_bytes(where, b"good")
    assert store.fetch(where, sha256=digest).read_bytes() == b"good"


def test_without_a_digest_nothing_stale_is_served(moto_s3, tmp_path, monkeypatch):
    monkeypatch.setenv("LATENTRAY_CACHE", str(tmp_path / "cache"))
    where = moto_s3.uri("x.bin")
    store.write_bytes(where, b"old")
    assert store.fetch(where).read_bytes() == b"old"
    store.write_bytes(where, b"new")
    assert store.fetch(where).read_bytes() == b"new"


@pytest.mark.parametrize("verb", ["write_bytes", "upload"])
def test_a_write_that_is_cut_short_leaves_the_old_content(tmp_path, monkeypatch, verb):
    target, source = tmp_path / "file", tmp_path / "source"
    target.write_bytes(b"old")
    source.write_bytes(b"new")

    def fail(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(target, b"new") if verb == "write_bytes" else store.upload(source, target)
    assert target.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


@pytest.fixture
def nfs_client(monkeypatch) -> set[str]:
    """This process as an NFS client: what it looked for in vain is not there for it until it opens the folder.

    So Linux 6.1 does for up to 30 s (acdirmin), NFS 3 and 4.2 (`make test-nfs`); here it would for ever.
    """
    missing: set[str] = set()

    def remembering(real, is_open):
        def call(path, *args, **kwargs):
            name = os.path.abspath(path) if isinstance(path, str | os.PathLike) and "dir_fd" not in kwargs else ""
            if name in missing:
                raise FileNotFoundError(2, "remembered", name)
            try:
                done = real(path, *args, **kwargs)
            except FileNotFoundError:
                missing.add(name)
                raise
            if is_open and name and os.path.isdir(name):
                missing.difference_update({one for one in missing if os.path.dirname(one) == name})
            return done

        return call

    for module, name, is_open in (
        (os, "stat", False), (os, "unlink", False), (io, "open", False), (os, "open", True), (os, "scandir", True),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, remembering(getattr(module, name), is_open))
    return missing


LOOKS = {
    "exists": (store.exists, False, True),
    "read_bytes": (store.read_bytes, InputMissing, b"1"),
    "list_files": (lambda path: store.list_files(path.parent), [], ["file"]),
    "list_folders": (lambda path: store.list_folders(path.parent.parent), [], ["there"]),
}


@pytest.mark.parametrize("look", list(LOOKS))
def test_what_another_node_wrote_is_seen_although_it_was_looked_for_before(tmp_path, nfs_client, look) -> None:
    verb, before, after = LOOKS[look]
    path = tmp_path / "run" / "there" / "file"
    for _ in range(2):
        if before is InputMissing:
            with pytest.raises(InputMissing):
                verb(path)
        else:
            assert verb(path) == before
    assert not path.exists() and not path.parent.exists() and not path.parent.parent.exists()
    assert {str(path), str(path.parent)} <= nfs_client
    subprocess.run(["sh", "-c", f"mkdir -p {path.parent} && printf 1 > {path}"], check=True)
    assert not path.exists(), "the client believes what it remembers"
    assert verb(path) == after


def test_what_another_node_wrote_is_deleted_although_it_was_looked_for_before(tmp_path, nfs_client) -> None:
    path = tmp_path / "stop.json"
    assert not path.exists()
    path_there = ["sh", "-c", f"printf 1 > {path}"]
    subprocess.run(path_there, check=True)
    store.delete(path)
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_goes_while_it_is_looked_at_is_none(tmp_path, monkeypatch) -> None:
    """Another node's retention may be faster, and an NFS client may have seen the file for the last time."""
    manifest.seal(str(tmp_path), {}, kind="checkpoint")
    monkeypatch.setattr(store, "exists", lambda _uri: True)
    (tmp_path / manifest.NAME).unlink()
    assert manifest.find(str(tmp_path)) is None


def test_a_transient_error_is_retried(tmp_path, monkeypatch):
    monkeypatch.setattr(store.write_bytes.retry, "sleep", lambda _seconds: None)
    real, calls = store.Path.replace, []

    def flaky(self, target):
        calls.append(target)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr("pathlib.Path.replace", flaky)
    store.write_bytes(tmp_path / "file", b"x")
    assert len(calls) == 3
    assert (tmp_path / "file").read_bytes() == b"x"


def test_uris():
    assert store.join("s3://b/", "/a/", "c.json") == "s3://b/a/c.json"
    assert store.is_remote("s3://b/a")
    assert not store.is_remote("file:///tmp/a")
    assert str(store.local_path("file:///tmp/a")) == "/tmp/a"
    assert store.absolute("s3://b/a") == "s3://b/a"
    assert store.absolute("a/b").startswith("/")


def test_a_file_uri_is_a_local_path(tmp_path):
    store.write_bytes(f"file://{tmp_path}/a/b.bin", b"x")
    assert (tmp_path / "a" / "b.bin").read_bytes() == b"x"


def test_the_digest_of_a_value_does_not_depend_on_the_order_of_its_keys():
    assert store.digest_of({"a": 1, "b": [1, 2]}) == store.digest_of(json.loads('{"b": [1, 2], "a": 1}'))
    assert store.digest_of({"a": 1}) != store.digest_of({"a": 2})


def test_a_full_disk_is_refused_and_a_remote_target_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: types.SimpleNamespace(free=10 << 20))
    store.require_space(tmp_path / "not" / "yet", 5 << 20)
    with pytest.raises(EnvironmentRefused, match="10 MiB free, about 20 MiB needed"):
        store.require_space(tmp_path / "not" / "yet", 20 << 20)
    store.require_space("s3://bucket/out", 20 << 20)


def refusal(check, uri: str) -> EnvironmentRefused:
    with pytest.raises(EnvironmentRefused, match="Nothing can be written there: ") as caught:
        check(uri)
    assert caught.value.where == uri
    assert "out=<path or s3 URI>" in caught.value.mend
    return caught.value


def test_what_can_be_written_is_left_as_it_was(root):
    store.write_bytes(store.join(root, "kept"), b"x")
    for uri in (root, store.join(root, "not", "yet")):
        store.require_reachable(uri)
        store.require_writable(uri)
    assert store.list_files(root) == ["kept"]
    assert store.list_folders(root) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    for uri in (f"{tmp_path}/file", f"{tmp_path}/file/run", "/proc/run"):  # none may write in /proc, root neither
        store.require_reachable(uri)
        refusal(store.require_writable, uri)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_bucket_that_is_not_there_is_refused(moto_s3):
    refusal(store.require_writable, f"s3://{moto_s3.bucket}-other/run")


def test_an_endpoint_that_nothing_listens_at_is_refused(moto_s3, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert "connect to server" in refusal(store.require_reachable, moto_s3.uri("run")).what


def test_a_google_bucket_without_credentials_is_refused_in_time(monkeypatch):
    monkeypatch.setattr(store, "_GS_PATIENCE_S", 1)
    began = time.monotonic()
    refusal(store.require_reachable, "gs://bucket/run")
    assert time.monotonic() - began < 20


def test_a_scheme_that_is_not_known_or_only_read_is_refused():
    assert "foo://" in refusal(store.require_reachable, "foo://bucket/run").what
    refusal(store.require_writable, "http://127.0.0.1:9/run")


def test_staging_is_gone_afterwards():
    with store.staging() as folder:
        (folder / "x").write_bytes(b"x")
    assert not folder.exists()


def test_on_nfs_every_folder_that_was_changed_has_a_later_time_in_the_end(tmp_path, monkeypatch) -> None:
    """Other clients see a change by the folder's time, and two changes of one tick of the server's clock have one."""
    at_the_change = {}

    def noted(act):
        def wrapped(self, *given, **more):
            done = act(self, *given, **more)
            at_the_change[self.parent] = os.stat(self.parent).st_mtime_ns
            return done

        return wrapped

    monkeypatch.setattr(store, "_is_nfs", lambda device: True)
    monkeypatch.setattr(Path, "mkdir", noted(Path.mkdir))
    monkeypatch.setattr(Path, "replace", noted(Path.replace))
    store.write_bytes(tmp_path / "a" / "b" / "file", b"1")
    assert set(at_the_change) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    for turn in range(5):
        for folder, then in at_the_change.items():
            assert os.stat(folder).st_mtime_ns > then, (turn, folder)
        at_the_change.clear()
        store.upload(tmp_path / "a" / "b" / "file", tmp_path / "a" / "b" / f"copy-{turn}")
        assert set(at_the_change) == {tmp_path / "a" / "b"}


def test_a_time_that_does_not_move_holds_nothing_up_for_long(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "_is_nfs", lambda device: True)
    monkeypatch.setattr(store.os, "utime", lambda folder: None)
    begun = time.monotonic()
    store.write_bytes(tmp_path / "file", b"1")
    assert 2 <= time.monotonic() - begun < 10
    assert store.read_bytes(tmp_path / "file") == b"1"


def test_a_folder_on_this_disk_is_not_on_nfs_and_a_mount_of_it_is(tmp_path, monkeypatch) -> None:
    assert not store._is_nfs.__wrapped__(os.stat(tmp_path).st_dev)
    device = os.stat(tmp_path).st_dev
    told = f"36 35 {os.major(device)}:{os.minor(device)} / /nfs rw,noatime shared:1 - nfs4 server:/export rw,vers=4.2\n"
    monkeypatch.setattr(Path, "read_text", lambda self: told)
    assert store._is_nfs.__wrapped__(device)
    assert not store._is_nfs.__wrapped__(device + 1)
