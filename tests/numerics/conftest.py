"""Tiny inputs and the training runs on them, made once per session."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from latentray.checkpoint import weights


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny, tiny_clips = _module("tiny"), _module("tiny_clips")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        return tiny.build_all(tmp_path_factory.mktemp("tiny"), patch)


@pytest.fixture(scope="session")
def clips(inputs, tmp_path_factory) -> dict[str, str]:
    """`data` and `latents` of clips."""
    with pytest.MonkeyPatch.context() as patch:
        return tiny_clips.build_all(tmp_path_factory.mktemp("clips"), patch, tiny, inputs)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run's folder."""

    out: Path
    output: str

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def trajectory(self, name: str) -> list[float]:
        return [line[name] for line in self.lines() if name in line]

    def raw(self) -> dict:
        return weights.read(self.out / "raw.safetensors")

    def exported(self) -> dict:
        (path,) = [*self.out.glob("model/denoiser.safetensors"), *self.out.glob("autoencoder/autoencoder.safetensors")]
        return weights.read(path)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _run(folder: Path, jobs: list[dict], *, world: int = 1, expect: int = 0) -> str:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    script = Path(__file__).with_name("runs.py")
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder / "jobs.json"), str(_free_port())],
        cwd=folder, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="session")
def run_jobs():
    """(folder, jobs, world=1, expect=0) -> what `runs.py` said."""
    return _run


@pytest.fixture(scope="session")
def runs(inputs, tmp_path_factory) -> dict[str, Run]:
    """Name -> run: `stage1` and `stage2` on one worker, `..._zero0` ... `..._zero3` on two, `resumed`, `damaged`."""
    root = tmp_path_factory.mktemp("runs")
    stage1 = [*tiny.STAGE1, f"data={inputs['data']}"]
    stage2 = [*tiny.STAGE2, f"latents={inputs['latents']}"]

    def job(name: str, overrides: list[str], **more) -> dict:
        return {"name": name, "overrides": [*overrides, f"run={name}", f"out={root / name}"], **more}

    often = [*stage2, "checkpoint_every_samples=16"]
    edm = [o for o in stage2 if not o.startswith("objective")]
    edm += ["objective=edm", "stage.sampler=heun", "stage.sampling_steps=3", "total_samples=96"]
    tiny.write_pictures(root / "second", "train", 24)
    shard = root / "second" / "data" / "train" / "00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    mixed = [*tiny.STAGE1, "damage.policy=skip", "damage.max_bad_fraction=0.5"]
    mixed.append(f"mixture.of=[{{uri:{inputs['data']},weight:1}},{{uri:{root}/second/data,weight:1}}]")
    one = [
        job("stage2", stage2),
        job("stage1", stage1),
        job("edm", edm),
        job("mixed", mixed),
        job("sizes", [*stage2, "denoiser.pooled_width=16", "denoiser.size_numbers=6", "denoiser.size_width=8"]),
        *(job(name, settings) for name, settings in tiny.beside(inputs).items()),
        job("resumed", often, die_at=4),
    ]
    outputs = {"one": _run(root, one, expect=9)}
    shutil.copytree(root / "resumed", root / "damaged")
    newest = sorted((root / "damaged" / "checkpoints").iterdir())[-1]
    shutil.copytree(root / "resumed", root / "moved")
    victim = newest / "denoiser" / "rank_00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    outputs["resumed"] = _run(root, [job("resumed", often)])
    outputs["damaged"] = _run(root, [job("damaged", often)])
    two = [
        job(f"{name}_zero{zero}", [*settings, f"deepspeed=zero{zero}"])
        for zero in range(4)
        for name, settings in (("stage1", stage1), ("stage2", stage2))
    ]
    elsewhere = job("moved", [*often, "deepspeed=zero3"])
    outputs["moved"] = outputs["two"] = _run(root, [*two, job("mixed_two", mixed), elsewhere], world=2)
    return {path.name: Run(path, outputs.get(path.name, "")) for path in root.iterdir() if path.is_dir()}
