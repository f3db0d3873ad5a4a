"""Tiny inputs of both stages, written once per session without Ray."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny():
    """The module that writes them (shared with tests/numerics)."""
    path = Path(__file__).resolve().parents[2] / "numerics" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny_inputs", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def inputs(tiny, tmp_path_factory) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        return tiny.build_all(tmp_path_factory.mktemp("tiny"), patch)
