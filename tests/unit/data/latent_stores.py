"""What tests of the latent job write and read: small data sets, and the records and digests of a store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentray.checkpoint import manifest
from latentray.data import index, members, shards


def write_data(root: Path, samples: Sequence[shards.Sample], per_shard: int) -> str:
    """A data set with a training split below `root`; its URI."""
    folder = root / "built"
    folder.mkdir(parents=True)
    made = [
        shards.write_shard(samples[i : i + per_shard], folder / shards.shard_name(k))
        for k, i in enumerate(range(0, len(samples), per_shard))
    ]
    index.write(made, folder / index.NAME)
    manifest.publish(folder, str(root / "train"), kind="dataset")
    return str(root)


def opened(uri: str) -> shards.IndexedShards:
    return shards.IndexedShards.open(uri, kind="latents")


def records(uri: str) -> dict[str, dict[str, Any]]:
    """Key -> members of every record, in the order they stand in."""
    held = opened(uri)
    return {held.key(x): members.decode_sample(held.read(x)) for x in range(held.count)}


def digests(uri: str) -> dict[str, str]:
    """File name -> sha256 of a store's files."""
    return {name: entry.sha256 for name, entry in manifest.read(uri).files.items()}
