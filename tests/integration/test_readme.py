"""The README's commands, run as they stand: long ones in miniature."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from latentray.checkpoint import manifest
from latentray.data import synthetic

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
MINIATURE = {
    "train": ["total_samples=64", "global_batch_size=16", "log_every_samples=32", "tracking=none"],
    "evaluate": ["samples=4", "heldout_samples=8", "steps=2"],
    "sample": ["n=2", "steps=2"],
}
"""What shrinks a command of the README to a test's size."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(process: subprocess.Popen, log: Path, text: str, seconds: float) -> None:
    """Until `text` stands in the log. Fails with the log where the process ends first or time is up."""
    end = time.monotonic() + seconds
    while text not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"{text!r} never came (exit code {process.poll()}):\n{log.read_text()[-6000:]}")
        time.sleep(0.5)


def kill(process: subprocess.Popen) -> None:
    """End a process group that this test started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def test_the_readme_names_two_commands_first() -> None:
    assert [line for line in COMMANDS if line.startswith("make ")] == ["make quickstart", "make test"]


def test_make_test_is_a_target_that_installs_and_runs_pytest() -> None:
    shown = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pytest" in shown


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_make_quickstart_in_miniature(tmp_path: Path) -> None:
    """`make quickstart SCALE=mini KEEP_SERVING=1`: the report, the key, the endpoint that stays, and its clean end."""
    out, log, port = tmp_path / "quickstart", tmp_path / "log", free_port()
    command = ["make", "quickstart", "SCALE=mini", "KEEP_SERVING=1", f"PORT={port}", f"OUT={out}"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MAKEFLAGS", "MAKELEVEL")}
    with open(log, "w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_for(process, log, "The endpoint stays up", 500)
        key = (out / "api_key").read_text().strip()
        assert stat.S_IMODE((out / "api_key").stat().st_mode) == 0o600
        curl = re.search(r"  (curl -s .*?> picture\.png)", log.read_text(), re.DOTALL)
        assert curl, log.read_text()[-3000:]
        subprocess.run(
            curl[1],
            shell=True,
            cwd=tmp_path,
            env=environment | {"API_KEY": key, "NO_PROXY": "127.0.0.1"},
            check=True,
            timeout=120,
        )
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        (job,) = psutil.Process(process.pid).children()  # make itself would end by an interrupt, whatever the job does
        job.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            kill(process)
    check_report(out)
    text = log.read_text()
    assert "Traceback" not in text, text[-6000:]
    tail = text[text.index("Report: ") :]
    assert len(re.findall(r"^  python -m jobs\.", tail, re.MULTILINE)) >= 3


def check_report(out: Path) -> None:
    """report.json has its figures, report.html loads nothing, and the lineage is one chain of digests."""
    report = json.loads((out / "report.json").read_text())
    assert report["autoencoder"]["psnr"] > 5
    for key in ("color_accuracy", "background_accuracy", "shape_accuracy", "heldout_color_accuracy"):
        assert 0 <= report["samples"][key] <= 1
    assert report["samples"]["pictures"] == 54 and report["samples"]["heldout_pictures"] == 3
    stages = {
        "install",
        "shards",
        "autoencoder",
        "latents",
        "denoiser",
        "evaluate",
        "promote",
        "serve",
        "draw",
        "report",
    }
    assert set(report["timings"]) == stages
    assert report["total_seconds"] == pytest.approx(sum(report["timings"].values()), rel=0.15)
    nodes = {node["role"]: node for node in report["lineage"]}
    assert nodes["autoencoder"]["inputs"]["dataset"] == nodes["dataset"]["digest"]
    assert nodes["latents"]["inputs"]["autoencoder"] == nodes["autoencoder"]["digest"]
    assert nodes["model"]["inputs"]["latents"] == nodes["latents"]["digest"]
    assert nodes["report"]["inputs"]["model"] == nodes["model"]["digest"]
    assert nodes["release"]["digest"] == manifest.read(nodes["release"]["uri"]).digest
    assert report["release"]["id"] in nodes["release"]["uri"]
    page = (out / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    for kind in synthetic.UNSEEN:
        assert synthetic.caption(kind) in page


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `pictures/`: 200 pictures and their captions, of which about four are kept for validation."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("mine")
    (folder / "pictures").mkdir()
    for i in range(200):
        kind = synthetic.kind_of("train", i)
        Image.fromarray(synthetic.draw(kind, 0, i)).save(folder / "pictures" / f"{i:03d}.png")
        (folder / "pictures" / f"{i:03d}.txt").write_text(synthetic.caption(kind))
    return folder


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_your_own_pictures(own_pictures: Path) -> None:
    """Every other command of the README, in its order."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    commands = [line for line in COMMANDS if line.startswith("python -m jobs.")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)
        job = words[2].removeprefix("jobs.")
        words = [sys.executable, *words[1:], *MINIATURE.get(job, [])]
        if job == "train" and "experiment=shapes_autoencoder" in words:
            words += ["stage.lpips.start_samples=0", "stage.discriminator.start_samples=32"]
        if job == "serve":
            serve_and_ask(words, own_pictures, environment)
            continue
        done = subprocess.run(words, cwd=own_pictures, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def serve_and_ask(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    port, log = free_port(), folder / "serve.log"
    with open(log, "w") as sink:
        process = subprocess.Popen(
            [*words, f"port={port}"],
            cwd=folder,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(process, log, "curl -s", 200)
        body = json.dumps({"prompt": "a red circle on a white background", "num_inference_steps": 2}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/images/generations", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as reply:
            assert len(json.load(reply)["data"]) == 1
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            kill(process)
