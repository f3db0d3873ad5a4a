"""The installer: pip's settings reach uv, and pip installs where uv can't."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "infra/install.py"


@pytest.fixture(scope="module")
def installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("installer", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_mirror_of_pips_configuration_is_uvs_index(installer: ModuleType) -> None:
    listing = "\n".join(
        (
            ":env:.find-links='/wheels /more'",
            "global.index-url='https://mirror.example/simple'",
            "global.find-links='/forgotten'",
            "install.extra-index-url='https://a.example/simple\\nhttps://b.example/simple'",
            "download.index-url='https://another.example/simple'",
            "global.timeout='60'",
        )
    )
    made = installer.uv_environment(installer.pip_settings(listing), {"HOME": "/home/u"})
    assert made["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert made["UV_INDEX"] == "https://a.example/simple https://b.example/simple"
    assert made["UV_FIND_LINKS"] == "/wheels,/more", "a variable wins over a file"
    assert made["HOME"] == "/home/u" and not any("60" in value for value in made.values())


def test_what_the_user_has_set_for_uv_stays(installer: ModuleType) -> None:
    made = installer.uv_environment({"index-url": "https://pips"}, {"UV_DEFAULT_INDEX": "https://uvs"})
    assert made["UV_DEFAULT_INDEX"] == "https://uvs"


@pytest.mark.parametrize(
    ("uv_comes", "uv_works", "asked"), [(True, True, "u"), (True, False, "up"), (False, False, "p")]
)
def test_pip_installs_where_uv_cannot(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, uv_comes: bool, uv_works: bool, asked: str
) -> None:
    calls = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if "config" in command:
            return subprocess.CompletedProcess(command, 0, "global.index-url='https://mirror.example/simple'\n")
        if command[-1] == "uv":
            return subprocess.CompletedProcess(command, 0 if uv_comes else 1)
        assert command[-2:] == ["--editable", ".[train]"] and "constraints.txt" in command
        calls.append("u" if "uv" in command else "p")
        if "uv" in command:
            assert options["env"]["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"  # type: ignore[index]
            return subprocess.CompletedProcess(command, 0 if uv_works else 1)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(installer.subprocess, "run", run)
    assert installer.main(".[train]") == 0
    assert "".join(calls) == asked
