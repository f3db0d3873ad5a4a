"""The endpoint on real Ray Serve, on a loopback port, with a model that draws flat colours."""

from __future__ import annotations

import base64
import io
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import ray
from PIL import Image

from latentray.checkpoint import manifest
from latentray.config.serve import ServeConfig
from latentray.errors import ArtifactError, DigestMismatch, EnvironmentRefused, InputMissing
from serving import keys, launch
from serving.releases import Release

FAKES = Path(__file__).resolve().parents[1] / "unit" / "serving"
pytestmark = pytest.mark.timeout(240)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def published(folder: Path, name: str, **files: str) -> Release:
    """A release folder in a registry's layout, with a manifest."""
    source = folder / "source"
    source.mkdir(parents=True)
    for file, text in {"config": "{}", **files}.items():
        (source / file).write_text(text)
    uri = folder / "registry" / "releases" / name
    manifest.publish(source, uri, kind="release")
    shutil.rmtree(source)
    return Release(id=name, uri=str(uri))


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    release = published(folder, "r-1")
    key = keys.create(folder / "api_key")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES))  # where the replicas find the loader
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        running = launch.serve(
            ServeConfig(
                release=release.uri,
                port=free_port(),
                key_hashes=[keys.hash_of(key)],
                loader="flat_colour:FlatColour.load",
                max_batch_size=4,
                batch_wait_timeout_s=0.2,
                max_queued_requests=8,
                request_timeout_s=20,
                start_timeout_s=120,
            ),
            block=False,
        )
        running.key, running.folder = key, folder
        try:
            yield running
        finally:
            running.stop()
            assert not ray.is_initialized()


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.base_url}/v1", api_key=endpoint.key, max_retries=0, timeout=30) as client:
        yield client


def pixel(entry) -> tuple[int, int, int]:
    return Image.open(io.BytesIO(base64.b64decode(entry.b64_json))).getpixel((0, 0))


def test_openais_client_works_end_to_end(client):
    reply = client.images.generate(
        prompt="a red circle on a white background",
        model="latentray",
        n=3,
        size="64x64",
        response_format="b64_json",
        user="someone",
        extra_body={
            "seed": 5,
            "sampler": "euler",
            "num_inference_steps": 4,
            "guidance_scale": 2,
            "negative_prompt": "x",
        },
    )
    assert len(reply.data) == 3 and pixel(reply.data[0])[:2] == (5, 0)
    assert reply.seed == 5 and reply.model == "r-1" and reply.warnings == []
    assert [model.id for model in client.models.list()] == ["latentray", "r-1"]
    assert client.models.retrieve("r-1").owned_by == "latentray"


def test_openais_client_edits_a_picture(client):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "PNG")
    reply = client.images.edit(
        image=("photo.png", buffer.getvalue()), prompt="a blue square", n=2, extra_body={"seed": 5, "strength": 0.5}
    )
    assert pixel(reply.data[0])[:2] == (5, 0) and reply.size == "64x64" and reply.warnings == []
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=buffer.getvalue(), prompt="x", extra_body={"label": 3})
    assert caught.value.param == "label"
    with pytest.raises(openai.APIStatusError) as large:
        client.images.edit(image=b"x" * (9 << 20), prompt="x")
    assert large.value.status_code == 413


def test_same_seed_same_bytes(client):
    one, two = (client.images.generate(prompt="x", n=2, extra_body={"seed": 9}) for _ in range(2))
    assert [entry.b64_json for entry in one.data] == [entry.b64_json for entry in two.data]


def test_errors_have_openais_form(client, endpoint):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", n=99)
    assert caught.value.param == "n" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="x", response_format="url")
    assert caught.value.param == "response_format"
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="x", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{endpoint.base_url}/v1", api_key="lr-wrong", max_retries=0).models.list()


def test_only_health_is_open(endpoint):
    for path, status in {
        "/healthz": 200,
        "/readyz": 200,
        "/docs": 401,
        "/openapi.json": 401,
        "/v1/models": 401,
    }.items():
        try:
            with urllib.request.urlopen(endpoint.base_url + path, timeout=10) as reply:
                found = reply.status
        except urllib.error.HTTPError as error:
            found = error.code
        assert found == status, path


def test_concurrent_requests_of_different_settings_share_batches(client):
    def draw(j: int):
        extra = {
            "seed": j,
            "sampler": ["ddim", "euler"][j % 2],
            "num_inference_steps": 1 + j,
            "guidance_scale": 1.0 + j,
        }
        return client.images.generate(prompt="batch size", extra_body=extra)

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(draw, range(4)))
    assert [pixel(reply.data[0])[0] for reply in replies] == [0, 1, 2, 3], "each gets its own picture"
    assert max(pixel(reply.data[0])[2] for reply in replies) > 1, "at least two were drawn in one call"


def test_one_failing_request_does_not_fail_its_neighbours(client):
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(client.images.generate, prompt="good", extra_body={"seed": 3})
        bad = pool.submit(client.images.generate, prompt="fail")
        with pytest.raises(openai.InternalServerError) as caught:
            bad.result()
        assert "out of memory" not in str(caught.value)
        assert pixel(good.result().data[0])[0] == 3


def test_a_full_queue_answers_429_and_tells_when_to_come_back(client):
    def draw(j: int) -> int:
        try:
            client.images.generate(prompt="slow", extra_body={"seed": j})
        except openai.RateLimitError as error:
            assert error.response.headers["retry-after"] and error.code == "queue_full"
            return 429
        return 200

    with ThreadPoolExecutor(32) as pool:
        statuses = list(pool.map(draw, range(32)))
    assert set(statuses) == {200, 429}, statuses


def test_a_promotion_is_applied_in_place_and_a_broken_release_is_not(client, endpoint):
    changed = threading.Event()
    drawn_by = []

    def draw_throughout() -> None:
        while not changed.is_set():
            drawn_by.append(client.images.generate(prompt="x").model)  # answered throughout, or this raises

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw_throughout)
        try:
            while not drawn_by and not drawing.done():
                time.sleep(0.05)  # the old release has answered before it is replaced
            endpoint.roll_out(published(endpoint.folder / "two", "r-2"))
            assert client.images.generate(prompt="x").model == "r-2"
            with pytest.raises(ArtifactError, match="do not fit"):
                endpoint.roll_out(published(endpoint.folder / "three", "r-3", broken="yes"))
            time.sleep(3)  # the answers go on when Serve has had time to act on the failure
        finally:
            changed.set()
        drawing.result()
    assert endpoint.release.id == "r-2" and set(drawn_by) == {"r-1", "r-2"}
    assert drawn_by == sorted(drawn_by), "once promoted, the old release answers no more"
    time.sleep(2.5)
    assert client.models.retrieve("latentray").latentray["release"] == "r-2"
    endpoint.roll_out(endpoint.first)


def test_mistakes_are_refused_before_a_cluster_starts(endpoint, tmp_path):
    good = {"release": endpoint.release.uri, "key_hashes": endpoint.config.key_hashes}
    with pytest.raises(EnvironmentRefused, match="port=") as caught:
        launch.serve(ServeConfig(**good, port=endpoint.config.port))
    assert str(endpoint.config.port) in str(caught.value)
    with pytest.raises(EnvironmentRefused, match="no API key"):
        launch.serve(ServeConfig(release=endpoint.release.uri, port=free_port()))
    with pytest.raises(InputMissing):
        launch.serve(ServeConfig(**good | {"release": str(tmp_path / "nothing")}, port=free_port()))
    damaged = published(tmp_path, "r-4", weights="abc")
    (Path(damaged.uri) / "weights").write_text("abd")
    with pytest.raises(DigestMismatch, match="weights"):
        launch.serve(ServeConfig(**good | {"release": damaged.uri}, port=free_port()))
