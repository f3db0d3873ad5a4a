"""The shape of the repository: what must never shadow the standard library, and what the commands in texts promise."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("platform/latentray", "jobs", "serving", "tests", "infra")


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def in_root(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user does: in the repository's root, with nothing on PYTHONPATH."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True)


def test_pythons_own_platform_module_survives() -> None:
    done = in_root("-c", "import platform; print(platform.system(), platform.python_version())")
    assert done.returncode == 0, done.stderr
    assert sys.version.split()[0] in done.stdout
    assert in_root("-m", "pytest", "--version").returncode == 0


def test_platform_is_a_source_root_with_one_package() -> None:
    assert not list((ROOT / "platform").glob("*.py"))
    packages = [p.name for p in (ROOT / "platform").iterdir() if p.is_dir() and any(p.rglob("*.py"))]
    assert packages == ["latentray"]


def test_no_module_carries_a_name_of_the_standard_library() -> None:
    """`python -m jobs.x` puts the root first on sys.path, and tools put a script's own folder there."""
    taken = [p for p in python_files("jobs", "serving", "tests") if p.stem in sys.stdlib_module_names]
    assert not taken


def test_nothing_is_called_utils() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert not [p for p in python_files(*SOURCES) if vague & {p.stem, *p.relative_to(ROOT).parts}]


def test_a_job_is_a_page() -> None:
    """An entrypoint composes, checks and makes one call; what it calls lives elsewhere."""
    programs = [p for p in python_files("jobs") if '__name__ == "__main__"' in p.read_text()]
    assert programs
    assert not {p.name: n for p in programs if (n := len(p.read_text().splitlines())) >= 60}
    undocumented = [
        p.name
        for p in programs
        if f"python -m jobs.{p.stem}" not in (ast.get_docstring(ast.parse(p.read_text())) or "")
    ]
    assert not undocumented, "a job's docstring is how to run it"


def test_a_file_is_readable_in_one_sitting() -> None:
    assert not {
        str(p.relative_to(ROOT)): n for p in python_files(*SOURCES) if (n := len(p.read_text().splitlines())) > 500
    }


def test_the_package_imports_lightly() -> None:
    program = (
        "import sys, time; t = time.perf_counter(); import latentray; t = time.perf_counter() - t;"
        "print(t, *({'torch', 'ray', 'deepspeed', 'hydra'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        done = in_root("-c", f"import sys; sys.path.insert(0, 'platform'); {program}")
        assert done.returncode == 0, done.stderr
        spent, *heavy = done.stdout.split()
        assert not heavy
        seconds.append(float(spent))
    assert min(seconds) < 0.5


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target in ("quickstart", "test", "test-full", "lint", "format", "bench", "clean"):
        assert re.search(rf"^ +make {target} +\S", done.stdout, re.MULTILINE), target


def texts_with_commands() -> Iterator[Path]:
    yield from (ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci/run")
    for folder in ("infra", "jobs", "conf"):
        yield from (
            p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in {".md", ".yaml", ".py", ".train", ".serve"}
        )


@pytest.mark.parametrize("path", list(texts_with_commands()), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_in_a_text_exists(path: Path) -> None:
    for job in re.findall(r"-m jobs\.(\w+)", path.read_text()):
        assert find_spec(f"jobs.{job}") is not None, f"python -m jobs.{job}"
