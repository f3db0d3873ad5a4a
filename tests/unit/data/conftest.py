"""What tests of the latent job share: small networks, and the job's stages in a row instead of on Ray."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from latentray.data import latent_parts, latent_shards, precompute
from latentray.data.latent_encoder import Encoder
from latentray.data.latent_plan import Part


def _module(name: str, path: Path) -> ModuleType:
    """A file of helpers as a module that tests can import by name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


for _name in ("gray_shards", "latent_stores"):
    _module(_name, Path(__file__).with_name(f"{_name}.py"))


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """`tests/numerics/tiny.py`: an autoencoder for pictures of 64 pixels that makes 8 of one, and a text encoder."""
    torch.set_num_threads(1)
    return _module("tiny_for_data", Path(__file__).resolve().parents[2] / "numerics" / "tiny.py")


@pytest.fixture
def in_process(monkeypatch) -> list[Part]:
    """The stages one after another, in this process; the parts that were read."""
    read: list[Part] = []

    def run(config, job, work):
        encoder = Encoder(job)
        for one in work:
            names = dict(one.written)
            for part in one.left:
                read.append(part)
                parcel = latent_parts.Parcel.from_table(latent_parts.read_part(job, part).to_table())
                names[part.number] = latent_shards.write_part(job, encoder.encode(parcel))
            latent_shards.assemble(job, one.split, one.name, [names[number] for number in sorted(names)])
            yield one

    monkeypatch.setattr(precompute, "_run", run)
    return read
