"""The fake model, its ModelInfo and the HTTP app around it, without a cluster."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from latentray.config.serve import ServeConfig
from serving import api, keys
from serving.loading import Loaded
from serving.messages import ModelInfo, Picture

KEY = "lr-a-client"


def _flat_colour():
    spec = importlib.util.spec_from_file_location("flat_colour", Path(__file__).with_name("flat_colour.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module.FlatColour


class DirectBackend:
    """Draws in this process; `failure` is raised instead where a test sets it."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.failure, self.is_ready = loaded, None, True

    async def info(self) -> ModelInfo:
        return self.loaded.info

    async def ready(self) -> bool:
        return self.is_ready

    async def draw(self, requests) -> list[Picture | Exception]:
        if self.failure is not None:
            raise self.failure
        return self.loaded.draw(requests)


@pytest.fixture
def info() -> ModelInfo:
    model = _flat_colour()
    return ModelInfo(
        release_id="r-1",
        release="registry/releases/r-1",
        created=1_700_000_000,
        size=model.size,
        downsampling=model.downsampling,
        samplers=model.samplers,
        max_steps=model.max_steps,
        sampler=model.defaults.sampler,
        steps=model.defaults.steps,
        guidance_scale=model.defaults.guidance_scale,
    )


@pytest.fixture
def loaded(info) -> Loaded:
    return Loaded(model=_flat_colour()(), info=info, threads=None)


@pytest.fixture
def backend(loaded) -> DirectBackend:
    return DirectBackend(loaded)


@pytest.fixture
def config() -> ServeConfig:
    return ServeConfig(registry="registry", max_n=4, max_steps=40, max_prompt_chars=200, max_body_bytes=4096)


@pytest.fixture
def anyone(config, backend) -> TestClient:
    """A client without a key."""
    app = api.create(config, backend, key_hashes=[keys.hash_of("lr-another"), keys.hash_of(KEY)])
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(anyone) -> TestClient:
    """A client with a key."""
    anyone.headers["Authorization"] = f"Bearer {KEY}"
    return anyone
