"""Tiny encoders, shared with tests/numerics."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny():
    path = Path(__file__).resolve().parents[2] / "numerics" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny_for_conditioning", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
