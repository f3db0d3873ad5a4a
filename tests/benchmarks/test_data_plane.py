"""How fast samples come: the latent reader beside WebDataset's, the index of ten million, the order, the bytes fetched."""

import hashlib
import io
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from PIL import Image

from latentray.checkpoint import manifest
from latentray.data import index, shards
from latentray.data.blocks import BlockCache
from latentray.data.latent_batches import latent_batches
from latentray.data.lines import Reading
from latentray.data.ordering import Order
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource
from latentray.data.transforms import Augment

pytestmark = pytest.mark.slow
SAMPLES, SHARDS, BATCH = 4096, 4, 256
PAIRS = 9
TEXTS = {"plain": (1, 8), "with text": (77, 768)}


def store_of(root, length, width):
    """Latents of 16x16x4 with one caption's embedding, as the latent store writes them."""
    folder = root / "built"
    folder.mkdir()
    made = []
    for number in range(SHARDS):
        some = []
        for i in range(SAMPLES // SHARDS):
            tensors = {
                "mean": torch.randn(4, 16, 16),
                "logvar": torch.randn(4, 16, 16),
                "text.clip.tokens": torch.randn(1, length, width).half(),
                "text.clip.mask": torch.ones(1, length, dtype=torch.uint8),
                "text.clip.pooled": torch.randn(1, width).half(),
            }
            members = {"latent.safetensors": safetensors.torch.save(tensors), "json": b'{"captions": ["a red circle"]}'}
            some.append(shards.Sample(key=f"{number * SAMPLES // SHARDS + i:09d}_0", members=members))
        made.append(shards.write_shard(some, folder / shards.shard_name(number)))
    index.write(made, folder / index.NAME)
    manifest.publish(folder, root / "set", kind="latents")
    return root / "set"


def stock(uri):
    """WebDataset: sequential tars, each member decoded, equal batches."""

    def decode(sample):
        tensors = safetensors.torch.load(sample["latent.safetensors"])
        return [
            tensors["mean"],
            tensors["logvar"],
            *(tensors[f"text.clip.{n}"][0] for n in ("tokens", "mask", "pooled")),
        ]

    urls = [str(path) for path in sorted(uri.glob("*.tar"))]
    collate = lambda rows: [torch.stack(column) for column in zip(*rows, strict=True)]  # noqa: E731
    return webdataset.WebDataset(urls, shardshuffle=False).map(decode).batched(BATCH, collation_fn=collate)


@pytest.mark.parametrize(("kind", "asked"), [("plain", 10.0), ("with text", 4.0)])
def test_latents_in_training_order_against_webdataset_in_tar_order(tmp_path, kind, asked):
    uri = store_of(tmp_path, *TEXTS[kind])
    data = shards.IndexedShards.open(uri, kind="latents")
    order = Order.of(data.count, 0, BATCH)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pairs: list[tuple[float, float]] = []
    try:
        for _ in range(1 + PAIRS):
            began = time.perf_counter()
            source = OrderedSource([data], order, last_step=SAMPLES // BATCH)
            assert sum(len(batch.ids) for batch in latent_batches(source)) == SAMPLES
            ours = SAMPLES / (time.perf_counter() - began)
            began = time.perf_counter()
            assert sum(len(batch[0]) for batch in stock(uri)) == SAMPLES
            pairs.append((ours, SAMPLES / (time.perf_counter() - began)))
    finally:
        torch.set_num_threads(threads)
    ours_N, theirs_N = np.array(pairs[1:]).T  # the first pair met files and memory that were new
    low, middle, high = np.percentile(ours_N / theirs_N, [25, 50, 75])
    print(
        f"\nlatents {kind}: {np.median(ours_N):,.0f}/s in training order, checked; WebDataset {np.median(theirs_N):,.0f}/s: "
        f"{middle:.1f}x, quartiles {low:.1f} and {high:.1f} of {PAIRS} pairs (asked {asked:g}x)"
    )
    assert middle > 0.6 * asked


OPEN = """
import re, sys, time
import numpy, pyarrow
from latentray.data.index import Index
from latentray.data.ordering import Order
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource
from latentray.data.transforms import Augment

def memory():  # MiB of its own, and of the page cache mapped
    about = dict(re.findall(r"(\\w+): +(\\d+) kB", open("/proc/self/smaps_rollup").read()))
    own = int(about["Anonymous"]) / 1024
    return own, int(about["Rss"]) / 1024 - own

before = memory()
began = time.perf_counter()
opened = Index(sys.argv[1])
a = time.perf_counter()
ids = Order.of(opened.count, 1, 1024).step(123_456).ids
ranges = list(opened.locate_all([one.index for one in ids]))
b = time.perf_counter()
print(a - began, b - a, *(after - first for after, first in zip(memory(), before)))
"""


def test_an_index_of_ten_million_samples(tmp_path):
    """Opened, and a batch at a random step located, by a fresh process; the digest is checked once, by the driver."""
    count, each = 10_000_000, 10_000
    rng = np.random.default_rng(0)
    import pyarrow as pa

    results = []
    for number in range(count // each):
        lengths = rng.integers(50_000, 150_000, each)
        rows = {
            "key": pa.array([f"{number * each + i:09d}" for i in range(each)], pa.large_string()),
            "offset": pa.array(np.concatenate([[0], np.cumsum(lengths)[:-1]]), pa.int64()),
            "length": pa.array(lengths, pa.uint32()),
            "crc32c": pa.array(rng.integers(0, 2**32, each), pa.uint32()),
            "sha256": pa.array([rng.bytes(32)] * each, pa.binary(32)),
            "width": pa.array(rng.integers(256, 2048, each), pa.int32()),
            "height": pa.array(rng.integers(256, 2048, each), pa.int32()),
        }
        entry = index.ShardEntry(
            name=f"{number:05d}.tar", sha256=hashlib.sha256(b"").hexdigest(), bytes=int(lengths.sum()), count=each
        )
        results.append(index.ShardResult(entry=entry, table=pa.table(rows)))
    path = tmp_path / index.NAME
    index.write(results, path)
    began = time.perf_counter()
    digest = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
    hashed = time.perf_counter() - began
    done = subprocess.run([sys.executable, "-c", OPEN, str(path)], capture_output=True, text=True, check=True)
    opened, located, held, mapped = map(float, done.stdout.split())
    print(
        f"\nindex of 10 million ({path.stat().st_size / 2**20:.0f} MiB): digest {hashed:.2f} s, opened in {opened:.3f} s, "
        f"a batch of 1024 at a random step located in {located:.3f} s, {held:.0f} MiB held (asked < 1 s, < 0.5 s, < 50 MB), "
        f"{mapped:.0f} MiB of the page cache mapped; sha256 {digest[:8]}"
    )
    assert opened + hashed < 10
    assert located < 5
    assert held < 50


@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_bytes_fetched_by_all_nodes_in_an_epoch(tmp_path, world):
    """One rank a node, a cache a node, samples of 100 kB in 1 MiB blocks, chunks of 8 MiB."""
    sample, per_shard, count = 100_000, 1000, 240_000
    order = Order.of(count, 3, 192, reading=Reading(chunk=84, depth=16))
    size = sample * per_shard
    fetched = [0]

    class Counting(BlockCache):
        """The cache's own decisions, with a set for its folder: files of a terabyte are not written here."""

        def __init__(self):
            super().__init__(tmp_path, capacity_bytes=1 << 50)
            self.held = set()

        def take(self, uri, offset, length):
            wanted = range(offset // self.block, (offset + length - 1) // self.block + 1)
            new = [number for number in wanted if (uri, number) not in self.held]
            fetched[0] += sum(min((n + 1) * self.block, size) - n * self.block for n in new)
            self.held |= {(uri, number) for number in new}

    nodes = [Counting() for _ in range(world)]
    steps = order.steps_in(1)
    for t in range(steps):
        for rank, node in enumerate(nodes):
            for one in order.part(t, rank, world).ids:
                node.take(one.index // per_shard, one.index % per_shard * sample, sample)
    ratio = fetched[0] / (count * sample)
    print(f"\nbytes fetched in an epoch by {world} nodes: {ratio:.3f} x the data set (asked <= 1.2)")
    assert ratio <= 1.2


def test_bad_pictures_cost_next_to_nothing(tmp_path):
    """200 pictures of which 10 do not decode, against 200 that do; WebDataset's own handler sleeps half a second for each."""
    noise = np.random.default_rng(0)

    def pictures(bad):
        root = tmp_path / str(bad)
        folder = root / "built"
        folder.mkdir(parents=True)
        some = []
        for i in range(200):
            low = Image.fromarray(noise.integers(0, 255, (64, 64, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            low.resize((512, 512), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            data = buffer.getvalue()
            some.append(
                shards.Sample(
                    key=f"{i:05d}",
                    members={
                        "jpg": data[: len(data) // 2] if i % 20 == 7 and bad else data,
                        "txt": b"x",
                        "json": b"{}",
                    },
                )
            )
        index.write([shards.write_shard(some, folder / "00000.tar")], folder / index.NAME)
        manifest.publish(folder, root / "set", kind="dataset")
        return shards.IndexedShards.open(root / "set")

    rates = {}
    for bad in (False, True):
        data = pictures(bad)
        order = Order.of(200, 0, 20)
        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            source = OrderedSource([data], order, last_step=10, skip_damaged=True)
            batches = picture_batches(source, shapes=[(256, 256)], augment=Augment())
            damaged = [one for batch in batches for one in batch.damaged]
            best = max(best, 200 / (time.perf_counter() - began))
        assert len(damaged) == (10 if bad else 0)
        rates[bad] = best
    print(
        f"\n200 pictures, 10 bad: {rates[True]:.0f}/s against {rates[False]:.0f}/s, "
        f"{rates[True] / rates[False] - 1:+.1%} (asked > -5 %)"
    )
    assert rates[True] > 0.7 * rates[False]
