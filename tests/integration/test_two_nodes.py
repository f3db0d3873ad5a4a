"""The whole pipeline on two Ray nodes that share no disk: all that passes between processes goes through S3.

Three machines, as folders below one base: the nodes `a` (the head) and `b` with one CPU each, and the driver, which
stands for a client or a submitted job and belongs to neither node. Each has its own home, cache, temporary and working
folder; an audit hook in every Python process (`two_nodes/sitecustomize.py`) fails whatever touches another machine's
files. The nodes run the code that Ray shipped to them. One exception: the driver is attached to the head's raylet, so
it may use the head's Ray session folder.
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.registry import versions

ROOT = Path(__file__).resolve().parents[2]
GUARD = Path(__file__).parent / "two_nodes"

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Outcome:
    """What the driver reported, and what the guard recorded."""

    found: dict[str, Any]
    record: list[dict[str, Any]]

    def machines_that_imported(self, module: str) -> set[str]:
        return {line["machine"] for line in self.record if line.get("imported") == module}


def machine(base: Path, name: str, *, allowed: tuple[Path, ...] = ()) -> dict[str, str]:
    """Make a machine's folders; the environment of its processes."""
    own = base / name
    for folder in ("home", "cache", "tmp", "work", "ray"):
        (own / folder).mkdir(parents=True)
    record = base / "record.jsonl"
    guard = {"name": name, "base": str(base), "allowed": [str(p) for p in (own, *allowed)], "record": str(record)}
    return {
        "HOME": str(own / "home"),
        "XDG_CACHE_HOME": str(own / "home" / ".cache"),
        "LATENTRAY_CACHE": str(own / "cache"),
        "TMPDIR": str(own / "tmp"),
        "RAY_TMPDIR": str(own / "ray"),
        "LATENTRAY_TEST_GUARD": json.dumps(guard),
        "PYTHONPATH": str(GUARD),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture
def two_nodes(moto_s3, monkeypatch) -> Iterator[tuple[str, Path]]:
    """The address of the cluster, and the base folder of its machines."""
    from ray.cluster_utils import Cluster

    base = Path(os.path.realpath(tempfile.mkdtemp(prefix="lr-")))  # short: Ray's socket paths are limited
    monkeypatch.setenv("RAY_TMPDIR", str(base))  # Cluster notes its address there, and not where other drivers look
    (base / "ray").mkdir()
    cluster = Cluster(shutdown_at_exit=True)
    try:
        for name in ("a", "b"):
            env = machine(base, name)
            monkeypatch.chdir(base / name / "work")
            head = {"include_dashboard": False} if name == "a" else {}
            cluster.add_node(
                num_cpus=1,
                object_store_memory=100 * 2**20,
                temp_dir=str(base / name / "ray"),
                env_vars=env,
                node_name=name,
                **head,
            )
        cluster.wait_for_nodes()
        monkeypatch.chdir(ROOT)
        yield cluster.address, base
    finally:
        monkeypatch.chdir(ROOT)
        cluster.shutdown()
        shutil.rmtree(base, ignore_errors=True)


def run_driver(address: str, base: Path, uri: str) -> Outcome:
    """Run the driver on a machine of its own."""
    env = os.environ | machine(base, "driver", allowed=(base / "a" / "ray",))
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT), str(GUARD)])
    elsewhere = base.parent / f"lr-shared-{secrets.token_hex(4)}"
    command = [sys.executable, str(GUARD / "driver.py"), address, uri, str(ROOT), str(elsewhere)]
    with subprocess.Popen(
        command, env=env, cwd=base / "driver" / "work", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        try:
            output, _ = driver.communicate(timeout=600)
        except BaseException:
            driver.kill()
            raise
    print(output)
    record = [json.loads(line) for line in (base / "record.jsonl").read_text().splitlines()]
    assert driver.returncode == 0, [line for line in record if "violation" in line]
    assert not elsewhere.exists()
    return Outcome(json.loads(output.strip().splitlines()[-1]), record)


def test_the_whole_pipeline_runs_on_two_nodes_that_share_no_disk(two_nodes, moto_s3):
    address, base = two_nodes
    outcome = run_driver(address, base, moto_s3.uri("pipeline"))
    found = outcome.found

    # The guard can fail, on both nodes and the driver, and nothing else ever failed it.
    controls = found["controls"]
    assert controls["own"] == ["opened", "opened"]
    for what in ("other", "drivers", "shared", "driver"):
        assert len(controls[what]) == 2, what
        assert all(said.startswith("ForeignFile: ") for said in controls[what]), (what, controls[what])
    violations = [line for line in outcome.record if "violation" in line]
    expected = sorted([*"aabb", "driver", "driver", "a", "b"])
    assert sorted(line["machine"] for line in violations) == expected, violations

    # It was at work wherever the work was done: both nodes trained, packed or encoded, and one of them served.
    assert outcome.machines_that_imported("latentray.training.loop") - {"driver"} == {"a", "b"}
    assert outcome.machines_that_imported("latentray.data.precompute") == {"a", "b", "driver"}
    assert outcome.machines_that_imported("latentray.data.shard_building") >= {"driver"}
    assert outcome.machines_that_imported("latentray.data.shard_building") & {"a", "b"}
    assert outcome.machines_that_imported("serving.loading") & {"a", "b"}

    check_lineage(found)
    check_training(found)
    check_reply(found)

    # Each machine fetched what it needed of the shards itself, and cleared up after itself.
    for name in ("a", "b"):
        assert any(path.is_file() for path in (base / name / "cache" / "blocks").rglob("*")), name
    assert not list(base.glob("*/tmp/latentray-*")) and not list(base.glob("*/cache/*/.partial-*"))
    assert all(p.name in {"a", "b", "driver", "record.jsonl", "ray"} for p in base.iterdir())


def check_lineage(found: dict[str, Any]) -> None:
    """From the release's manifest back to the shards: every digest is that of the artifact it names."""
    at = found["at"]
    data, latents = manifest.read(f"{at['data']}/train"), manifest.read(f"{at['latents']}/train")
    autoencoder, model = manifest.read(found["autoencoder"]), manifest.read(found["model"])
    release = versions.verify(at["registry"], "production")
    assert data.meta["samples"] == 102 and latents.meta["samples"] == 102
    assert sorted(n for n in latents.files if n.endswith(".tar")) == [f"{n:05d}.tar" for n in range(4)]
    assert autoencoder.inputs == {"dataset": data.digest}
    assert latents.inputs["dataset"] == data.digest and latents.inputs["autoencoder"] == autoencoder.digest
    assert latents.inputs["text_encoder"] == model.inputs["text_encoder"] == manifest.read(at["text"]).digest
    assert model.inputs["latents"] == latents.digest and model.inputs["autoencoder"] == autoencoder.digest
    assert release.inputs["model"] == model.digest and release.inputs["latents"] == latents.digest
    assert versions.read_alias(at["registry"], "production").release == found["release"]


def check_training(found: dict[str, Any]) -> None:
    """Both runs logged every step once, left verified checkpoints and none of Ray's own files; the second continued
    from its checkpoint after both its workers were killed, with the metrics of the dead attempt."""
    assert len(found["killed"]) == 2 and all(k["metrics"] for k in found["killed"])
    for run, samples, every in (("ae", 60, 3), ("diffusion", 720, 10)):
        out = found["at"][run]
        logs = [line["samples"] for line in logged(out) if "train/loss" in line]
        assert logs == list(range(12, samples + 1, 12)), run
        assert manifest.read(out, kind="run").meta["run"] == run
        attempts: dict[str, list[int]] = {}
        for name in store.list_folders(f"{out}/checkpoints"):
            step, attempt = name.split("-")
            if manifest.find(f"{out}/checkpoints/{name}") is not None:
                manifest.fetch_all(f"{out}/checkpoints/{name}", kind="checkpoint")
                attempts.setdefault(attempt, []).append(int(step))
        assert [n for steps in attempts.values() for n in steps] == list(range(every, samples // 12 + 1, every)), run
        assert len(attempts) == (2 if run == "diffusion" else 1)
        assert "ray" not in store.list_folders(out)
    lines = logged(found["at"]["ae"])
    assert [line["samples"] for line in lines if "discriminator/loss" in line] == [60]
    assert [line["samples"] for line in lines if "autoencoder/lpips" in line] == [48, 60]
    assert "pictures" in store.list_folders(found["at"]["ae"])


def logged(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in store.read_bytes(f"{out}/metrics.jsonl").decode().splitlines()]


def check_reply(found: dict[str, Any]) -> None:
    """The endpoint drew one picture, with the release that was promoted."""
    reply = found["reply"]
    picture = Image.open(io.BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))
    assert picture.size == (64, 64) and reply["seed"] == 7 and reply["model"] == found["release"]
    assert found["release"] in [model["id"] for model in found["models"]["data"]]
