"""An id on the hub in place of a folder: by the hub's own client, from an endpoint on loopback, and from its cache alone."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest

from latentray.checkpoint import manifest
from latentray.errors import ConfigError, InputMissing
from latentray.interchange import diffusers_folders, folders, hub, single_file

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as its client asks of it: a repository's listing and its files."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *args) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        names = sorted(one.relative_to(self.folder).as_posix() for one in self.folder.rglob("*") if one.is_file())
        if path.startswith("/api/models/tiny/sd1/tree/"):
            return self._send(json.dumps([self._entry(name) for name in names]).encode(), body, "application/json")
        if path.startswith("/api/models/tiny/sd1"):
            listing = {"id": "tiny/sd1", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            return self._send(json.dumps(listing).encode(), body, "application/json")
        prefix = f"/tiny/sd1/resolve/{COMMIT}/"
        name = path.removeprefix(prefix if path.startswith(prefix) else "/tiny/sd1/resolve/main/")
        if name not in names:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if "tiny/sd1" not in path else "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if body:
            self.asked.append(name)
        return self._send((self.folder / name).read_bytes(), body, "application/octet-stream")

    def _entry(self, name: str) -> dict:
        data = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _send(self, data: bytes, body: bool, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def endpoint(pipeline_folder, tmp_path):
    """A hub that holds `tiny/sd1`, with a pickle beside its weights; (its address, names of the files that were fetched)."""
    folder = shutil.copytree(pipeline_folder("sd1"), tmp_path / "repository")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("# tiny")
    handler = type("Handler", (_Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


def run(tmp_path: Path, address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "jobs.import_weights", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_hub_id_is_imported_through_the_job(endpoint, tmp_path):
    address, asked = endpoint
    done = run(tmp_path, address, "weights=tiny/sd1", f"out={tmp_path}/model")
    assert done.returncode == 0, done.stderr
    assert f"next: python -m jobs.sample release={tmp_path}/model" in done.stdout
    made = manifest.read(f"{tmp_path}/model", kind="model")
    assert (made.meta["imported_from"], made.meta["base_model"], made.meta["base_commit"]) == (
        "tiny/sd1",
        "tiny/sd1",
        COMMIT,
    )
    assert "unet/diffusion_pytorch_model.safetensors" in asked
    done = run(tmp_path, address, "weights=tiny/nothing", f"out={tmp_path}/other")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "tiny/nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()


def test_of_a_repository_on_the_hub_only_what_is_read_is_fetched(endpoint, pipeline_folder, tmp_path, monkeypatch):
    address, asked = endpoint
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    found = diffusers_folders.from_diffusers("tiny/sd1")
    assert found.denoiser == diffusers_folders.from_diffusers(str(pipeline_folder("sd1"))).denoiser
    assert "unet/diffusion_pytorch_model.safetensors" in asked
    assert not [name for name in asked if name.endswith((".bin", ".md"))]
    assert len(asked) == len(set(asked))  # each once, though two requests choose
    before = len(asked)
    diffusers_folders.from_diffusers("tiny/sd1")
    assert len(asked) == before
    with pytest.raises(InputMissing) as caught:
        diffusers_folders.from_diffusers("tiny/nothing")
    assert caught.value.where == "tiny/nothing"


def test_without_a_network_the_clients_cache_is_read(pipeline_folder, hub_cache):
    hub_cache("tiny/sd1", pipeline_folder("sd1"), COMMIT)
    found = diffusers_folders.from_diffusers("tiny/sd1")
    assert found.denoiser == diffusers_folders.from_diffusers(str(pipeline_folder("sd1"))).denoiser
    assert diffusers_folders.from_diffusers(f"tiny/sd1@{COMMIT}").denoiser == found.denoiser


def test_what_the_cache_lacks_is_refused_with_what_to_do(pipeline_folder, hub_cache):
    there = hub_cache("tiny/sd1", pipeline_folder("sd1"), COMMIT)
    for source in ("tiny/sd2", "tiny/sd1@v2", "tiny/sd1/other.safetensors"):
        with pytest.raises(InputMissing, match="the hub did not give it") as caught:
            folders.local(source)
        assert caught.value.where == source
        assert "hf auth login" in caught.value.mend
    shutil.rmtree(there / "vae")
    with pytest.raises(InputMissing) as caught:
        diffusers_folders.from_diffusers("tiny/sd1")
    assert "vae" in caught.value.where


def test_a_single_file_and_its_tokenizer_may_be_on_the_hub(pipeline_folder, clip_tokenizer, tmp_path, hub_cache):
    pipeline = diffusers_folders.from_diffusers(str(pipeline_folder("sd1")))
    (tmp_path / "file").mkdir()
    single_file.write(pipeline, tmp_path / "file" / "sd1.safetensors")
    hub_cache("tiny/file", tmp_path / "file")
    hub_cache("tiny/clip", clip_tokenizer)
    path = folders.local("tiny/file/sd1.safetensors")
    found = single_file.from_single_file(path, tokenizer="tiny/clip")
    assert found.denoiser == pipeline.denoiser
    with pytest.raises(ConfigError, match="pickle"):
        folders.local("tiny/file/sd1.bin")


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", True), ("owner/name@main", True), ("owner/name/file.safetensors", True),
        ("/absolute/path", False), ("./here", False), ("one", False), ("s3://bucket/x", False), ("a b/c", False),
    ],
)  # fmt: skip
def test_what_can_be_an_id(source, is_one):
    assert hub.is_id(source) == is_one
