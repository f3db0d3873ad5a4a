"""The storage, from one node and several: good ones, and each way one can fail."""

import threading
import time
from pathlib import Path

import pytest
from werkzeug.serving import make_server

from latentray.checkpoint import store
from latentray.planning import machine, storage_checks
from latentray.planning.findings import FAILED, OK, WARNING
from latentray.planning.storage_checks import here


def check(uri, nodes=1):
    (found,) = storage_checks.check(str(uri), {f"node-{i}": here for i in range(nodes)})
    return found


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_folder_is_good_and_left_as_it_was(tmp_path, nodes):
    (tmp_path / "kept").write_text("mine")
    assert check(tmp_path, nodes).status == OK
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert check(tmp_path / "new", nodes).status == OK
    assert not (tmp_path / "new").exists()


def test_a_bucket_is_good_and_left_as_it_was(moto_s3):
    found = check(moto_s3.uri("runs"), 2)
    assert found.status == OK and "2 nodes" in found.what
    assert store.list_files(moto_s3.uri()) == []


def test_a_folder_that_cannot_be_written_fails_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("/proc/latentray", tmp_path / "file" / "runs"):
        found = check(folder)
        assert found.status == FAILED
        assert f"cannot write at {folder}" in found.what
        assert "storage=" in found.mend


def test_a_bucket_that_is_not_there_fails(moto_s3):
    assert "cannot write" in check("s3://no-such-bucket/runs").what


def test_an_endpoint_that_is_down_is_told_at_once(moto_s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{machine.free_port()}")
    began = time.monotonic()
    found = check(moto_s3.uri("runs"), 2)
    assert time.monotonic() - began < 6
    assert found.status == FAILED and "refused" in found.what and "AWS_ENDPOINT_URL" in found.mend


@pytest.fixture
def no_delete(moto_s3, monkeypatch):
    """The S3 server with a gate before it that refuses deletion, as a bucket's policy does."""
    from moto.server import DomainDispatcherApplication, create_backend_app

    moto = DomainDispatcherApplication(create_backend_app)

    def gate(environ, start_response):
        deletes = environ["REQUEST_METHOD"] == "DELETE" or "delete" in environ.get("QUERY_STRING", "")
        if deletes:
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]
        return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, gate, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    yield moto_s3
    server.shutdown()


def test_a_bucket_that_lists_but_cannot_delete_fails(no_delete):
    found = check(no_delete.uri("runs"))
    assert found.status == FAILED
    assert "cannot delete" in found.what and "ACCESS_DENIED" in found.what.upper().replace(" ", "_")
    assert "s3:DeleteObject" in found.mend


def test_a_path_that_nodes_do_not_share_is_told(tmp_path):
    """Each node has a disk of its own below the same path."""

    def node(name):
        def do(function, *args):
            own = tmp_path / name
            own.mkdir(exist_ok=True)
            if hasattr(function, "args"):  # clear(folder), with its argument bound
                args = function.args
                function = function.func
                return function(*(str(a).replace("/shared", str(own)) for a in args), and_parent=False)
            return function(*(str(a).replace("/shared", str(own)) for a in args))

        return do

    (found,) = storage_checks.check("/shared/runs", {"a": node("a"), "b": node("b")})
    assert found.status == WARNING
    assert "not one folder on all nodes" in found.what and "s3://" in found.mend
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bytes_that_come_back_otherwise_fail(tmp_path):
    def do(function, *args):
        result = function(*args)
        if function is storage_checks.write:
            Path(args[0]).write_bytes(b"other")
        return result

    (found,) = storage_checks.check(str(tmp_path), {"a": do})
    assert found.status == FAILED and "other bytes" in found.what


def test_what_a_node_raises_is_a_finding(tmp_path):
    def do(function, *args):
        if function is storage_checks.names:
            raise TimeoutError("gave no answer")
        return function(*args)

    (found,) = storage_checks.check(str(tmp_path), {"a": do})
    assert found.status == FAILED and "cannot list" in found.what
    assert not list(tmp_path.iterdir())
