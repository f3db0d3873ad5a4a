"""Shards of gray pictures that say where they are from, for streams."""

import io
import tarfile

import numpy as np
from PIL import Image

from latentray.data.stream import stream_batches
from latentray.data.transforms import Augment
from latentray.records import SampleId


def png(value: int) -> bytes:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = value  # brighter on the left: a mirrored picture shows
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_shards(folder, counts):
    """Sample i of shard n is the gray 10 n + i + 20, and its caption says both."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, count in enumerate(counts):
        members = [
            one
            for i in range(count)
            for one in ((f"{n}-{i}.png", png(20 + 10 * n + i)), (f"{n}-{i}.txt", f"shard {n} sample {i}".encode()))
        ]
        write_tar(folder / f"{n:05d}.tar", members)
    return [str(folder / f"{n:05d}.tar") for n in range(len(counts))]


def place_of(one: SampleId) -> tuple[int, int]:
    return divmod(one.index, 2**32)


def run(uris, *, steps=6, batch=4, seed=3, augment=None, **options):
    return list(
        stream_batches(
            uris, seed=seed, global_batch=batch, shape=(8, 8), augment=augment or Augment(), last_step=steps, **options
        )
    )
