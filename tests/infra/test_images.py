"""The Dockerfiles against the tree, and the serving image's dependencies against what the serving code imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted(p for p in (ROOT / "infra/docker").glob("Dockerfile.*") if not p.name.endswith("dockerignore"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_NAMES = {"google-crc32c": "google_crc32c", "torch-fidelity": "torch_fidelity"}
"""Where a distribution's module is called otherwise."""


def test_there_are_two_images() -> None:
    assert [p.name for p in DOCKERFILES] == ["Dockerfile.serve", "Dockerfile.train"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_what_is_copied_exists_and_reaches_the_builder(path: Path) -> None:
    allowed = {x[1:] for x in path.with_name(path.name + ".dockerignore").read_text().splitlines() if x.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE)
    assert copied
    for line in copied:
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert Path(source).parts[0] in allowed, f"{source} is in .dockerignore"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_is_pinned_and_not_root(path: Path) -> None:
    text = path.read_text()
    final = text[text.rindex("\nFROM ") :]
    assert "--constraint constraints.txt" in text
    assert re.search(r"^USER 1000$", final, re.MULTILINE)
    assert "pip install" not in final, "multi-stage: nothing is built in what ships"
    (module,) = re.findall(r'"-m", "([\w.]+)"', final)
    assert (ROOT / (module.replace(".", "/") + ".py")).exists()


def test_constraints_pin_every_direct_dependency() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    lines = [x for x in pins.splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!-]+", x) for x in lines), (
        "exact pins, no URLs, no local tags"
    )
    names = {re.sub(r"[-_.]+", "-", x.split("==")[0]).lower() for x in lines}
    wanted = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    direct = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", r)[0]).lower() for r in wanted}  # type: ignore[index]
    assert direct - {"latentray"} <= names


def test_serving_imports_nothing_that_its_image_lacks() -> None:
    """The serving image installs the core dependencies alone; those of the `train` extra are made unimportable here."""
    train = [re.match(r"[\w.-]+", r)[0] for r in PROJECT["optional-dependencies"]["train"]]  # type: ignore[index]
    absent = sorted(IMPORT_NAMES.get(n, n) for n in train if n != "ray")
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (not in the serving image)", name=name)
sys.meta_path.insert(0, Absent())
import serving.app, jobs.serve, latentray.inference.sampling
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"deepspeed", "lpips", "wandb"} <= set(absent)
