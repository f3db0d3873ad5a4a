"""A run's folder on NFS, which two nodes mount: what one writes the other sees, and what NFS does that a disk does not.

`make test-nfs` runs them on a machine of its own (`machine.sh`). On a cluster, from the checkout on one of its nodes:

    LATENTRAY_TEST_NFS=/mnt/shared/try LATENTRAY_TEST_NFS_OTHER="ssh other" python -m pytest -m nfs tests/nfs -k "not away"

For the one of a server that is away, LATENTRAY_TEST_NFS_SERVER runs a command on the server, which it stops for a quarter of a
minute.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from latentray.checkpoint import manifest, store
from latentray.training import checkpoint, stopping

pytestmark = [pytest.mark.nfs, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
BATCH, STEPS = 8, 12
AT_ONCE_S = 2.0
SERVER_AWAY_S = 15.0


def tiny():
    spec = importlib.util.spec_from_file_location("tiny_nfs", ROOT / "tests/numerics/tiny.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that both nodes mount."""
    root = Path(os.environ["LATENTRAY_TEST_NFS"])
    mounts = sorted((p for p in psutil.disk_partitions(all=True) if root.is_relative_to(p.mountpoint)), key=mount_depth)
    assert mounts[-1].fstype in ("nfs", "nfs4"), f"{root} is of type {mounts[-1].fstype}"
    folder = Path(tempfile.mkdtemp(dir=root))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def mount_depth(partition: Any) -> int:
    return len(Path(partition.mountpoint).parts)


def other(*command: str) -> list[str]:
    """A command of the other node."""
    return [*shlex.split(os.environ["LATENTRAY_TEST_NFS_OTHER"]), *command]


def there(script: str) -> None:
    subprocess.run(other("sh", "-c", script), check=True, timeout=60)


LOOKS: dict[str, Callable[[Path], Any]] = {
    "exists": store.exists,
    "list_files": lambda path: store.list_files(path.parent),
    "list_folders": lambda path: store.list_folders(path.parent.parent),
    "find": lambda path: manifest.find(path.parent),
}


@pytest.mark.parametrize(
    ("look", "new_folder"), [(look, new) for look in LOOKS for new in (True, False) if new or look != "list_folders"]
)
def test_what_the_other_node_makes_is_seen_at_once_although_it_was_looked_for(shared, look, new_folder) -> None:
    written, path = shared / "written", shared / "run" / "there" / manifest.NAME
    manifest.seal(written, {}, kind="checkpoint")
    (path.parent.parent if new_folder else path.parent).mkdir(parents=True)
    before = LOOKS[look](path)
    for _ in range(10):  # what was looked for in vain is remembered for long
        assert LOOKS[look](path) == before and not path.exists()
        time.sleep(0.2)
    there(f"mkdir -p {path.parent} && mv {written}/{manifest.NAME} {path}")
    made = time.monotonic()
    remembered = not path.exists()
    while LOOKS[look](path) == before and time.monotonic() - made < 100:
        time.sleep(0.1)
    took = time.monotonic() - made
    print(
        f"\n{look}: {took:.1f} s after it was made; the client {'remembered that it is not' if remembered else 'knew'}"
    )
    assert took < AT_ONCE_S


TURNS = 150
WRITER = """
import sys
from latentray.checkpoint import store
print("ready", flush=True)
for line in sys.stdin:
    store.write_bytes(line.strip(), b"there")
    print("written", flush=True)
"""


def test_what_both_nodes_write_within_a_tick_of_the_servers_clock_is_seen(shared: Path) -> None:
    """Ranks write their parts of a checkpoint at once, and rank 0 waits for those of the others. A client learns that a folder
    changed from its time, which on many servers moves in ticks: where it had looked between two changes of one tick, it missed
    the second for good, once in 25 to 40 turns on NFS 3."""
    command, missed = other("env", f"PYTHONPATH={ROOT / 'platform'}", sys.executable, "-c", WRITER), []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        for turn in range(TURNS):
            path = shared / f"{turn}" / "theirs"
            writer.stdin.write(f"{path}\n")
            writer.stdin.flush()
            time.sleep(turn % 20 * 1e-3)
            store.write_bytes(path.with_name("own"), b"there")
            until = time.monotonic() + 2 * AT_ONCE_S
            while not store.exists(path) and time.monotonic() < until:
                time.sleep(0.02)
            assert writer.stdout.readline() == "written\n"
            missed += [] if store.exists(path) else [turn]
        writer.stdin.close()
    print(f"\n{len(missed)} of {TURNS} files were not seen: {missed}")
    assert not missed


def test_a_request_to_stop_that_the_other_node_makes_is_heard(shared: Path) -> None:
    stop = stopping.Stop(str(shared), leads=True)
    try:
        time.sleep(5)
        assert not stop.asked
        there(f"echo '{{}}' > {shared / stopping.REQUEST}")
        made = time.monotonic()
        while not stop.asked and time.monotonic() - made < 100:
            time.sleep(0.1)
        assert time.monotonic() - made < 2 + AT_ONCE_S, "it looks every two seconds"
    finally:
        stop.close()


def test_what_was_replaced_is_read_anew(shared: Path) -> None:
    """An alias moves by a rename on one node, and the server on another reads where it points."""
    where = shared / "production.json"
    store.write_bytes(where, b"one")
    for turn in range(5):
        assert store.read_bytes(where) == (b"one" if turn == 0 else f"turn {turn - 1}".encode())
        there(f"printf 'turn {turn}' > {shared}/.new && mv {shared}/.new {where}")
        assert store.read_bytes(where) == f"turn {turn}".encode()


def test_of_a_checkpoint_that_somebody_reads_nothing_is_left_in_the_end(shared: Path) -> None:
    """NFS has no files without a name: one that is open is renamed when it is deleted, and its folder cannot go."""
    out = str(shared)
    for step in (3, 6, 9):
        uri = f"{out}/checkpoints/{step:09d}-now"
        store.write_bytes(f"{uri}/denoiser/rank_00000.safetensors", bytes(4096))
        about = {"cursor": {"step": step}, "samples": step, "clock": {}, "world": 1}
        manifest.seal(uri, {}, kind=checkpoint.KIND, meta=about)
    folders = [path.name for path in sorted((shared / "checkpoints").iterdir())]
    with open(shared / "checkpoints" / folders[0] / "denoiser" / "rank_00000.safetensors", "rb") as reader:
        checkpoint.retain(out, keep=2, attempt="now")
        assert reader.read() == bytes(4096), "who reads it can read on"
        assert [one.step for one in checkpoint.candidates(out)] == [9, 6]
        left = [path.name for path in (shared / "checkpoints" / folders[0]).rglob("*") if path.is_file()]
        assert len(left) == 1 and left[0].startswith(".nfs"), left
    checkpoint.retain(out, keep=2, attempt="now")
    assert store.list_folders(f"{out}/checkpoints") == folders[1:]


class Runs:
    """Runs of two ranks, one on each node, whose folders they share; what they read lies there too."""

    def __init__(self, folder: Path, logs: Path, inputs: dict[str, str]) -> None:
        self.folder, self.logs, self.inputs, self.settings = folder, logs, inputs, tiny()

    def job(self, name: str, stage: int, zero: int, **more) -> dict:
        given = self.settings.STAGE1 if stage == 1 else [*self.settings.STAGE2, "stage.sampling_steps=2"]
        kept = [one for one in given if not one.startswith(("total_samples", "checkpoint_every"))]
        kept += [f"data={self.inputs['data']}" if stage == 1 else f"latents={self.inputs['latents']}"]
        kept += [f"deepspeed=zero{zero}", f"total_samples={STEPS * BATCH}", f"checkpoint_every_samples={3 * BATCH}"]
        return {"name": name, "overrides": [*kept, f"run={name}", f"out={self.folder / name}"], **more}

    @contextlib.contextmanager
    def started(self, *jobs: dict) -> Iterator[list[subprocess.Popen]]:
        """The two processes, ended in the end; what they said is kept on this node."""
        (self.folder / "jobs.json").write_text(json.dumps(jobs))
        interface, address = own_interface()
        with socket.socket() as taken:
            taken.bind((address, 0))
            port = taken.getsockname()[1]
        environ = {
            "MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": interface, "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "WANDB_MODE": "offline",
        }  # fmt: skip
        run = [sys.executable, str(ROOT / "tests/numerics/runs.py"), str(self.folder / "jobs.json"), "0"]
        processes = []
        try:
            for rank in range(2):
                command = ["env", *(f"{name}={value}" for name, value in (environ | {"RANK": str(rank)}).items()), *run]
                with open(self.log(rank), "w") as log:
                    processes.append(
                        subprocess.Popen(other(*command) if rank else command, stdout=log, stderr=log, cwd=ROOT)
                    )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def log(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def said(self) -> str:
        return "\n".join(self.log(rank).read_text()[-4000:] for rank in range(2))

    def run(self, *jobs: dict, killed: bool = False) -> None:
        with self.started(*jobs) as processes:
            codes = [process.wait(timeout=900) for process in processes]
            assert all((code != 0) == killed for code in codes), self.said()

    def end_state(self, name: str) -> list[bytes]:
        """sha256 of what each rank held at the end (weights, moments, random state of every network), and of the average."""
        held = [store.read_bytes(f"{self.folder / name}/state-{rank}.txt") for rank in range(2)]
        kind = "model" if store.exists(self.folder / name / "model" / manifest.NAME) else "autoencoder"
        made, file = manifest.read(self.folder / name / kind), {"model": "denoiser", "autoencoder": "autoencoder"}[kind]
        return [*held, made.files[f"{file}.safetensors"].sha256.encode()]

    def whole(self, name: str) -> list[int]:
        """Steps of the checkpoints, each file of which is what its manifest says."""
        found = checkpoint.candidates(str(self.folder / name))
        for one in found:
            manifest.fetch_all(one.uri)
        assert len(found) == len(store.list_folders(self.folder / name / "checkpoints"))
        return [one.step for one in found]


def own_interface() -> tuple[str, str]:
    """Name and address of this node's network."""
    for name, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family is socket.AF_INET and not one.address.startswith("127."):
                return name, one.address
    raise AssertionError("this node has no network")


@pytest.fixture
def runs(shared: Path, tmp_path: Path) -> Runs:
    with pytest.MonkeyPatch.context() as patch:
        return Runs(shared, tmp_path, tiny().build_all(shared / "inputs", patch))


@pytest.mark.parametrize("zero", [2, 3])
def test_n_steps_a_kill_and_n_steps_are_2n_steps(runs: Runs, zero: int) -> None:
    """Stages 1 and 2; both ranks are killed once the checkpoint of step 6 is whole."""
    runs.run(*(runs.job(f"whole-{stage}", stage, zero) for stage in (1, 2)))
    for stage in (1, 2):
        runs.run(runs.job(f"killed-{stage}", stage, zero, kill_at=STEPS // 2), killed=True)
        assert runs.whole(f"killed-{stage}")[0] == STEPS // 2
    runs.run(*(runs.job(f"killed-{stage}", stage, zero) for stage in (1, 2)))
    for stage in (1, 2):
        assert runs.end_state(f"killed-{stage}") == runs.end_state(f"whole-{stage}")
        assert runs.whole(f"killed-{stage}")[0] == STEPS


def test_a_run_outlives_its_server_being_away(runs: Runs) -> None:
    """Nothing answers for a quarter of a minute; then all goes on, with no step and no checkpoint lost."""
    on_server = shlex.split(os.environ["LATENTRAY_TEST_NFS_SERVER"])
    runs.run(runs.job("calm", 2, 2))
    with runs.started(runs.job("away", 2, 2)) as processes:
        until = time.monotonic() + 600
        while len(checkpoint.candidates(str(runs.folder / "away"))) < 1:
            assert time.monotonic() < until and all(one.poll() is None for one in processes), runs.said()
            time.sleep(0.1)
        subprocess.run([*on_server, "rpc.nfsd", "0"], check=True, timeout=60)
        try:
            time.sleep(SERVER_AWAY_S)
            assert all(one.poll() is None for one in processes), runs.said()
        finally:
            subprocess.run([*on_server, "rpc.nfsd", "4"], check=True, timeout=60)
        codes = [process.wait(timeout=600) for process in processes]
        assert codes == [0, 0], runs.said()
    assert runs.end_state("away") == runs.end_state("calm")
    assert runs.whole("away") == runs.whole("calm")
