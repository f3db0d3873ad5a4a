"""The latent job on Ray: killed encoders, a killed node, a killed driver, fewer encoders and a small object store change no
byte of what it writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from latentray import build
from latentray.checkpoint import manifest
from latentray.conditioning import tiny_text_encoder
from latentray.config import compose
from latentray.config.autoencoder import AutoencoderConfig
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TinyTextEncoderConfig
from latentray.data import index, latent_commit, latent_job, latent_parts, latent_shards, shards
from latentray.data.latent_encoder import Encoder
from latentray.models.autoencoder import KLAutoencoder, LatentScale

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]
SIZE, SHARDS, PER_SHARD = 128, 24, 10
HEAVY = AutoencoderConfig(channels=[32, 32], blocks=1, patch=2, attention=False, groups=4)
LIGHT = AutoencoderConfig(channels=[16], blocks=1, patch=8, attention=False, groups=4)
DRIVER = """
import sys
import ray
from latentray.config import command
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.data import precompute

store_bytes, folder, *overrides = sys.argv[1:]
if not any(one.startswith("address=") for one in overrides):
    own = {"num_cpus": 4, "object_store_memory": int(store_bytes), "include_dashboard": False, "_temp_dir": folder}
    ray.init(**own, logging_level="error")
sys.exit(command.run("precompute_latents", PrecomputeLatents, precompute.precompute, overrides))
"""


def picture(number: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_data(root: Path, pictures: list[bytes], per_shard: int, *, columns: bool = False) -> None:
    folder = root.with_name(f"{root.name}-built")
    folder.mkdir()
    samples = [
        shards.Sample(
            key=f"{number:09d}",
            members={"png": data, "txt": f"picture {number % 7}".encode()},
            columns={"sha256": hashlib.sha256(data).digest(), "width": width, "height": height},
        )
        for number, data in enumerate(pictures)
        for width, height in [Image.open(io.BytesIO(data)).size if columns else (SIZE, SIZE)]
    ]
    made = [
        shards.write_shard(samples[i : i + per_shard], folder / shards.shard_name(k))
        for k, i in enumerate(range(0, len(samples), per_shard))
    ]
    index.write(made, folder / index.NAME)
    manifest.publish(folder, str(root / "train"), kind="dataset")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A data set, a heavy and a light autoencoder, and a text encoder."""
    root = tmp_path_factory.mktemp("faults")
    torch.set_num_threads(1)
    write_data(root / "data", [picture(i, SIZE, SIZE + 16) for i in range(SHARDS * PER_SHARD)], PER_SHARD)
    for name, config in (("autoencoder", HEAVY), ("light", LIGHT)):
        net, built = build.seeded(lambda config=config: KLAutoencoder(config), 0), root / f"{name}-built"
        built.mkdir()
        scale = LatentScale(shift=0.0, scale=1.0)
        build.write_autoencoder(built, config, net.state_dict(), scale=scale, size=SIZE)
        manifest.publish(built, root / name, kind="autoencoder")
    small = TinyTextEncoderConfig(width=16, layers=1, heads=2, max_tokens=12, vocabulary=300)
    tiny_text_encoder.publish(str(root / "text"), ["picture 1"], small)
    return root


def settings(made: Path, out: Path, *more: str) -> list[str]:
    inputs = [f"data={made / 'data'}", f"autoencoder_from={made / 'autoencoder'}", f"out={out}"]
    return [*inputs, "batch_size=4", "device=cpu", "actors=[2,2]", *more]


def with_text(made: Path, out: Path, *more: str) -> list[str]:
    return settings(made, out, f"text_encoder.source={made / 'text'}", *more)


@pytest.fixture(scope="module")
def undisturbed(made) -> dict[str, str]:
    """sha256 of every file of the store, made in this process by one encoder."""
    config = compose.load("precompute_latents", PrecomputeLatents, with_text(made, made / "undisturbed"))
    plan = latent_job.plan(config)
    latent_commit.begin(plan)
    encoder = Encoder(plan.job)
    for one in plan.work:
        parcels = [encoder.encode(latent_parts.read_part(plan.job, part)) for part in one.left]
        names = [latent_shards.write_part(plan.job, parcel) for parcel in parcels]
        latent_shards.assemble(plan.job, one.split, one.name, names)
    latent_commit.commit(config, plan)
    return digests(made / "undisturbed")


def digests(out: Path) -> dict[str, str]:
    listing = manifest.read(out / "train")
    for name, entry in listing.files.items():
        assert hashlib.sha256((out / "train" / name).read_bytes()).hexdigest() == entry.sha256
    return {name: entry.sha256 for name, entry in listing.files.items()}


@contextlib.contextmanager
def job(overrides: list[str], *, store_bytes: int = 200 << 20):
    """The job with a cluster of its own, in another process; whatever is left of it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="lr-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", DRIVER, str(store_bytes), folder, *overrides]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            yield driver
        finally:
            for process in [*descendants(driver.pid), *cluster_of(folder)]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            driver.kill()
            driver.communicate()


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).children(recursive=True)
    return []


def cluster_of(folder: str) -> list[psutil.Process]:
    """What a killed driver leaves behind for a moment: the processes of the cluster in this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            if folder in " ".join(process.info["cmdline"] or ()):
                found.append(process)
    return found


def finish(driver: subprocess.Popen) -> str:
    output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 0, output
    return output


def wait_for(condition: Callable[[], bool], driver: subprocess.Popen) -> None:
    while not condition():
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.005)


def committed(out: Path) -> list[Path]:
    return sorted((out / "train").glob("*.rows"))


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of two nodes on this machine: the head, which can do the work alone, and another."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="lr-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)  # short: Ray's socket paths are limited
        (Path(folder) / "ray").mkdir()
        cluster = Cluster(shutdown_at_exit=True)
        try:
            common = {"object_store_memory": 100 << 20}
            cluster.add_node(num_cpus=3, include_dashboard=False, temp_dir=f"{folder}/head", **common)
            other = cluster.add_node(num_cpus=3, temp_dir=f"{folder}/other", **common)
            cluster.wait_for_nodes()
            yield cluster, other
        finally:
            cluster.shutdown()


def encoders_of(node) -> list[psutil.Process]:
    """The encoder actors that run on a node."""
    (raylet,) = node.all_processes["raylet"]
    found = []
    for process in descendants(raylet.process.pid):
        with contextlib.suppress(psutil.Error):
            found += [process] if "_EncoderActor" in " ".join(process.cmdline()) else []
    return found


def test_a_node_that_dies_changes_nothing(made, undisturbed, two_nodes, tmp_path):
    cluster, other = two_nodes
    out = tmp_path / "out"
    with job(with_text(made, out, f"address={cluster.address}")) as driver:
        wait_for(lambda: len(committed(out)) >= 2 and bool(encoders_of(other)), driver)
        at_death = len(committed(out))
        cluster.remove_node(other, allow_graceful=False)
        finish(driver)
    assert at_death < SHARDS
    assert digests(out) == undisturbed
    assert {path.name for path in (out / "train").iterdir()} == {*undisturbed, "manifest.json"}


def test_buckets_have_the_same_bytes_with_one_encoder_and_with_two(made, tmp_path):
    shapes = [(128, 128), (128, 200), (210, 128), (96, 96), (128, 160), (60, 100)]
    write_data(tmp_path / "data", [picture(i, *shapes[i % 6]) for i in range(60)], 9, columns=True)
    buckets = ["buckets.sizes=[64,128]", "buckets.step=16", "crops=2", f"data={tmp_path / 'data'}"]
    found = []
    for most in (1, 2):
        out = tmp_path / f"out-{most}"
        with job(with_text(made, out, *buckets, f"actors=[{most},{most}]")) as driver:
            finish(driver)
        found.append(digests(out))
    assert found[0] == found[1] and len(found[0]) == 7 + 3
    meta = manifest.read(tmp_path / "out-1" / "train").meta
    assert (meta["samples"], meta["encoded"]) == (120, 120)


def alive(driver: subprocess.Popen, killed: set[int]) -> list[psutil.Process]:
    """The job's encoder actors, without those that were killed."""
    found = []
    for one in descendants(driver.pid):
        with contextlib.suppress(psutil.Error):
            found += [one] if "_EncoderActor" in " ".join(one.cmdline()) and one.pid not in killed else []
    return found


def test_killed_encoders_change_nothing(made, undisturbed, tmp_path):
    out = tmp_path / "out"
    with job(with_text(made, out)) as driver:
        killed: set[int] = set()
        for seen in (1, 4):
            wait_for(lambda seen=seen: len(committed(out)) >= seen, driver)
            wait_for(lambda: bool(alive(driver, killed)), driver)  # the one that was killed may be starting again
            one = alive(driver, killed)[0]
            killed.add(one.pid)
            one.kill()
        finish(driver)
    assert digests(out) == undisturbed
    assert {path.name for path in (out / "train").iterdir()} == {*undisturbed, "manifest.json"}


def test_a_killed_driver_costs_the_parts_in_flight(made, undisturbed, tmp_path):
    out = tmp_path / "out"
    with job(with_text(made, out)) as driver:
        wait_for(lambda: len(committed(out)) >= 3, driver)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    done = {path.name.split(".")[0] + ".tar" for path in committed(out)}
    assert 3 <= len(done) < SHARDS
    before = {name: (out / "train" / name).stat().st_mtime_ns for name in done}
    with job(with_text(made, out, "actors=[1,1]")) as driver:
        finish(driver)
    assert digests(out) == undisturbed
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in done} == before


def test_more_pictures_than_the_object_store_holds_go_through_it(made, tmp_path):
    """400 MB of decoded pictures through 80 MB."""
    write_data(tmp_path / "data", [picture(i, 256, 320) for i in range(128)], 32)
    small = [f"data={tmp_path / 'data'}", "sizes=[256]", "crops=8", "flip_variants=true", "batch_size=32"]
    small += ["~text_encoder", "latent_dtype=float16", f"autoencoder_from={made / 'light'}"]
    with job(settings(made, tmp_path / "out", *small), store_bytes=80 << 20) as driver:
        finish(driver)
    listing = manifest.read(tmp_path / "out" / "train")
    assert listing.meta["samples"] == 128 * 16 and 128 * 16 * 3 * 256**2 > 400e6
    digests(tmp_path / "out")


def test_a_bad_picture_ends_the_job_with_one_message_or_is_left_out(made, tmp_path):
    write_data(tmp_path / "data", [picture(0, SIZE, SIZE), picture(1, SIZE, SIZE)[:300]], 2)
    wanted = settings(made, tmp_path / "out", f"data={tmp_path / 'data'}", "~text_encoder")
    with job(wanted) as driver:
        output, _ = driver.communicate(timeout=400)
    assert driver.returncode == 2, output
    assert "error: The sample '000000001' cannot be used" in output and "damage.policy=skip" in output
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()
    with job([*wanted, "damage.policy=skip", "damage.max_bad_fraction=0.5"]) as driver:
        finish(driver)
    (listed,) = (tmp_path / "out" / "train" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(listed)["reason"] == "unreadable"
