"""What storing latents gains over encoding as stage 2 goes, what a run waits for data, and how soon it has a first batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from latentray.checkpoint import manifest
from latentray.data import buckets, index

pytestmark = pytest.mark.slow
SAMPLES, PER_SHARD = 1_500_000, 10_000


def test_stored_latents_gain_what_the_arithmetic_allows_and_are_not_waited_for(tmp_path):
    """Whole training steps in turns with the bare parts of one; a limit of 1 would be a free encoder."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    script = Path(__file__).with_name("online_steps.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "made"), str(port)],
        env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    stored, online, denoiser, autoencoder, text = (
        np.array(found[name]) for name in ("stored", "online", "denoiser", "autoencoder", "text")
    )
    gain, limit = online / stored, (autoencoder + text + denoiser) / denoiser
    share = np.quantile(gain / limit, [0.25, 0.5, 0.75])
    milliseconds = {name: round(float(np.median(found[name])) * 1e3) for name in found if isinstance(found[name], list)}
    print(
        f"\nstored over online latents: {np.median(gain):.2f}x of at most {np.median(limit):.2f}x, {share[1]:.0%} (quartiles "
        f"{share[0]:.0%}, {share[2]:.0%}; asked 90 %); milliseconds of steps and bare parts: {milliseconds}"
        f"\ndata wait {found['data_wait_share']:.2%} of steps of {found['step'] * 1e3:.0f} ms (asked < 2 %)"
    )
    assert share[1] > 0.75
    assert found["step"] > 0.1
    assert found["data_wait_share"] < 0.02


def write_index(root: Path) -> list[tuple[int, int]]:
    """A store of 1.5 million latents in buckets of 256, 512 and 1024 pixels: its index, and shards that are elsewhere."""
    shapes = sorted({one for size in (256, 512, 1024) for one in buckets.shapes(size, step=64, max_aspect=2.0)})
    rng = np.random.default_rng(0)
    results = []
    for number in range(SAMPLES // PER_SHARD):
        height, width = np.array(shapes)[np.sort(rng.integers(0, len(shapes), PER_SHARD))].T
        rows = {
            "key": pa.array([f"{number * PER_SHARD + i:09d}_0" for i in range(PER_SHARD)], pa.large_string()),
            "offset": pa.array(np.arange(PER_SHARD) * 200_000, pa.int64()),
            "length": pa.array(np.full(PER_SHARD, 200_000), pa.uint32()),
            "crc32c": pa.array(rng.integers(0, 2**32, PER_SHARD), pa.uint32()),
            "source_sha256": pa.array([rng.bytes(32)] * PER_SHARD, pa.binary(32)),
            "width": pa.array(width, pa.int32()),
            "height": pa.array(height, pa.int32()),
        }
        name = f"{number:05d}.tar"
        entry = index.ShardEntry(
            name=name, sha256="0" * 64, bytes=PER_SHARD * 200_000, count=PER_SHARD, uri=f"/elsewhere/{name}"
        )
        results.append(index.ShardResult(entry=entry, table=pa.table(rows)))
    (root / "built").mkdir()
    index.write(results, root / "built" / index.NAME)
    meta = {
        "key": "k", "autoencoder_uri": "a", "autoencoder_fingerprint": "f", "scale": {"shift": 0.0, "scale": 1.0},
        "channels": 4, "size": 1024, "buckets": [list(one) for one in shapes], "texts": [], "variants": [0],
    }  # fmt: skip
    manifest.publish(root / "built", root / "latents" / "train", kind="latents", meta=meta)
    return shapes


FIRST_BATCH = """
import sys, time
from latentray.config import compose
from latentray.config.train import Train
from latentray.training.feed import Feed

config = compose.load("train", Train, ["cluster=none", f"latents={sys.argv[1]}"])
began = time.perf_counter()
feed = Feed.open(config)
opened = time.perf_counter()
cursor = feed.order.cursor(123_456)
resumed = feed.resumed(cursor)
ids = resumed.order.part(123_456, 0, 8).ids
ranges = list(feed.sets[0].index.locate_all([one.index for one in ids]))
print(opened - began, time.perf_counter() - opened, len(ranges))
"""


def test_a_million_and_a_half_samples_in_buckets_give_a_first_batch_at_once(tmp_path):
    """A fresh process opens the store, checks its index's digest, and locates a rank's share at a random cursor."""
    shapes = write_index(tmp_path)
    command = [sys.executable, "-c", FIRST_BATCH, str(tmp_path / "latents")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    opened, located, samples = map(float, done.stdout.split())
    print(
        f"\n1.5 million latents in {len(shapes)} buckets: opened in {opened:.2f} s, a share of {samples:.0f} samples at a "
        f"random cursor in {located:.3f} s (asked: seconds)"
    )
    assert opened + located < 10
