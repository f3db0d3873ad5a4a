"""What benchmarks share: `interleaved`, by that name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("interleaved", Path(__file__).with_name("interleaved.py"))
assert _spec is not None and _spec.loader is not None
_module = sys.modules["interleaved"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
