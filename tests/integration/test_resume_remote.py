"""Checkpoints in an object store: a run that is killed goes on from them bit for bit, and none that is damaged is loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentray.checkpoint import manifest, store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "tests/numerics/runs.py"
BATCH, STEPS = 8, 12
KINDS = [(stage, zero) for zero in (1, 2, 3) for stage in (1, 2)]


def tiny():
    spec = importlib.util.spec_from_file_location("tiny_remote", ROOT / "tests/numerics/tiny.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Bucket:
    """Runs of two ranks whose folders lie in a bucket."""

    def __init__(self, root: Path, s3, inputs: dict[str, str]) -> None:
        self.root, self.s3, self.inputs = root, s3, inputs
        self.settings = tiny()
        (root / "ledger").mkdir()

    def job(self, name: str, stage: int, zero: int, *, every: int = STEPS // 2, **more) -> dict:
        given, data = (
            (self.settings.STAGE1, f"data={self.inputs['data']}")
            if stage == 1
            else (self.settings.STAGE2, f"latents={self.inputs['latents']}")
        )
        kept = [one for one in given if not one.startswith(("total_samples", "checkpoint_every"))]
        kept += [data, f"deepspeed=zero{zero}", f"total_samples={STEPS * BATCH}"]
        kept += [f"checkpoint_every_samples={every * BATCH}", f"run={name}", f"out={self.uri(name)}"]
        kept += ["stage.sampling_steps=2"] if stage == 2 else []
        return {"name": name, "overrides": kept, **more}

    def uri(self, name: str) -> str:
        return self.s3.uri("runs", name)

    def run(self, *jobs: dict, expect: int = 0) -> str:
        (self.root / "jobs.json").write_text(json.dumps(jobs))
        noting = [str(ROOT / "platform"), str(ROOT), str(ROOT / "tests/integration/ledger")]
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(noting),
            "LATENTRAY_TEST_LEDGER": str(self.root / "ledger"),
            "LATENTRAY_CACHE": str(self.root / "cache"),
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [sys.executable, *launcher, str(RUNS), str(self.root / "jobs.json"), "0"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False, env=environ,
        )  # fmt: skip
        assert done.returncode == expect, done.stdout[-6000:]
        return done.stdout

    def state(self, name: str) -> list[bytes]:
        """sha256 of what each rank held at the end: weights, moments and random state of every network."""
        return [store.read_bytes(f"{self.uri(name)}/state-{rank}.txt") for rank in range(2)]

    def average(self, name: str, stage: int) -> str:
        """sha256 of the exported average."""
        kind = "autoencoder" if stage == 1 else "model"
        file = "autoencoder.safetensors" if stage == 1 else "denoiser.safetensors"
        return manifest.read(f"{self.uri(name)}/{kind}").files[file].sha256

    def checkpoints(self, name: str) -> list[str]:
        return [f"{self.uri(name)}/checkpoints/{one}" for one in store.list_folders(f"{self.uri(name)}/checkpoints")]


@pytest.fixture
def bucket(tmp_path: Path, moto_s3) -> Bucket:
    with pytest.MonkeyPatch.context() as patch:
        return Bucket(tmp_path, moto_s3, tiny().build_all(tmp_path / "inputs", patch))


def test_n_steps_a_kill_and_n_steps_are_2n_steps(bucket: Bucket, ledgers) -> None:
    """Stage 1 and 2 at ZeRO 1, 2 and 3: weights, moments, random state, average and the samples of every step."""
    for zero in (
        1,
        2,
        3,
    ):  # of processes of their own: ZeRO 3 leaves its `linear` behind, which rounds otherwise than torch's
        whole = bucket.run(*(bucket.job(f"whole-{stage}-{zero}", stage, zero) for stage in (1, 2)))
        for stage in (1, 2):
            bucket.run(bucket.job(f"killed-{stage}-{zero}", stage, zero, kill_at=STEPS // 2), expect=1)
        resumed = bucket.run(*(bucket.job(f"killed-{stage}-{zero}", stage, zero) for stage in (1, 2)))
        assert " ended: " not in whole + resumed, whole + resumed
        assert resumed.count(f"at step {STEPS // 2}") == 2
    for stage, zero in KINDS:
        whole, killed = f"whole-{stage}-{zero}", f"killed-{stage}-{zero}"
        assert bucket.state(killed) == bucket.state(whole), killed
        assert bucket.average(killed, stage) == bucket.average(whole, stage), killed
        read = [
            [[line["ids"] for line in ranks] for _, ranks in sorted(ledgers(bucket.root / "ledger", name).items())]
            for name in (whole, killed)
        ]
        assert len(read[0]) == STEPS and read[0] == read[1], killed


def copied(bucket: Bucket, name: str, to: str, *, without: str = "", flipped: str = "") -> None:
    """A run's folder once more, with a file missing, or with one bit of a file turned over."""
    for path in store.list_files(bucket.uri(name)):
        data = store.read_bytes(f"{bucket.uri(name)}/{path}")
        if path == flipped:
            at = len(data) // 2
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        if path != without:
            store.write_bytes(f"{bucket.uri(to)}/{path}", data)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_flipped_bit_in_any_file_or_a_missing_one_is_named_and_nothing_of_it_is_loaded(bucket: Bucket, stage) -> None:
    """The newest checkpoint is damaged: the one before it is taken; where it is the only one, the run is refused."""
    bucket.run(bucket.job("killed", stage, 2, every=3, kill_at=6), expect=1)
    bucket.run(bucket.job("whole", stage, 2, every=3))
    older, newest = sorted(one.removeprefix(f"{bucket.uri('killed')}/") for one in bucket.checkpoints("killed"))
    names = [one for one in store.list_files(bucket.uri("killed")) if one.startswith(newest)]
    parts = [one for one in names if one.endswith(".safetensors")]
    assert len(parts) == (4 if stage == 1 else 2) and len(names) == len(parts) + 1

    jobs, damages = [], {}
    for number, path in enumerate(names):
        copied(bucket, "killed", f"flipped-{number}", flipped=path)
        damages[f"flipped-{number}"] = path
    for number, path in enumerate(parts):
        copied(bucket, "killed", f"missing-{number}", without=path)
        damages[f"missing-{number}"] = path
    jobs = [bucket.job(name, stage, 2, every=3) for name in damages]
    output = bucket.run(*jobs)
    assert output.count("at step 3") == len(jobs)
    for name, path in damages.items():
        told = [line for line in output.splitlines() if line.startswith("checkpoint passed over: ") or "where:" in line]
        assert any(f"/{name}/" in line and path in line for line in told), (name, path)
        assert bucket.state(name) == bucket.state("whole"), "it went on from the one before, bit for bit"

    for path in store.list_files(f"{bucket.uri('killed')}/{older}"):
        store.delete(f"{bucket.uri('killed')}/{older}/{path}")
    alone = []
    for number, path in enumerate(parts):
        copied(bucket, "killed", f"alone-{number}", flipped=path)
        alone.append(bucket.job(f"alone-{number}", stage, 2, every=3))
    output = bucket.run(*alone)
    assert output.count("ArtifactError: All 1 checkpoints of the run are damaged") == 2 * len(alone), "on both ranks"
    for number in range(len(alone)):
        assert not store.exists(f"{bucket.uri(f'alone-{number}')}/state-0.txt"), "no step was done"


PLACES = (
    "before the upload", "between the ranks", "before the manifest", "in the manifest", "after the manifest", "in the retention",
)  # fmt: skip


def test_a_job_killed_while_it_saves_goes_on_from_the_newest_valid_checkpoint(bucket: Bucket) -> None:
    bucket.run(bucket.job("calm", 2, 2, every=3))
    for place in PLACES:
        name = place.replace(" ", "-")
        job = bucket.job(name, 2, 2, every=3)
        job["overrides"].append("keep_checkpoints=1")
        bucket.run(job | {"inject": {"dies_while_saving": {"place": place, "step": 6}}}, expect=1)
        output = bucket.run(job)
        sealed = place in ("after the manifest", "in the retention")
        assert f"at step {6 if sealed else 3}" in output, place
        assert bucket.state(name) == bucket.state("calm"), place
        assert [one.rsplit("/", 1)[-1].split("-")[0] for one in bucket.checkpoints(name)] == [f"{STEPS:09d}"], place
