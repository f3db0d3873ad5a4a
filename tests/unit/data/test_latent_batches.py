"""Batches of latents in buckets: exact shapes on any number of ranks, and fillers of the right shape for the damaged."""

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentray.data import buckets, latents
from latentray.data.buckets import Bucketed
from latentray.data.latent_batches import latent_batches
from latentray.data.ordering import Order
from latentray.data.pipeline import OrderedSource
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, DigestMismatch


def _load(name: str):
    path = Path(__file__).resolve().parents[2] / "numerics" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_for_latent_batches", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Latents in buckets: per bucket 18 records, in three shards."""
    root, tiny = tmp_path_factory.mktemp("buckets"), _load("tiny")
    torch.set_num_threads(1)
    given = {
        "autoencoder": tiny.write_autoencoder(str(root / "autoencoder")),
        "text_encoder": tiny.write_text_encoder(str(root / "text_encoder")),
    }
    return Path(_load("several_shapes").build_all(root, tiny, given)["buckets"]) / "train"


def opened(uri: Path) -> tuple[IndexedShards, Order]:
    data = IndexedShards.open(uri, kind=latents.KIND)
    shapes = latents.describe(data.uri, data.manifest).buckets
    table = buckets.table_of(shapes, pixel_budget=4 * 64 * 64, multiple=2)
    return data, Order((Bucketed(data.index, data.digest, table, buckets.exact),), 0, tuple(b.batch for b in table))


def damage(uri: Path, to: Path, rows) -> Path:
    """A copy of a store with a flipped byte in the latents of some records."""
    shutil.copytree(uri, to)
    data = IndexedShards.open(to, kind=latents.KIND)
    for x in rows:
        entry, offset, length = data.locate(int(x))
        with open(to / entry.name, "r+b") as file:
            file.seek(offset + length // 2)
            byte = file.read(1)
            file.seek(offset + length // 2)
            file.write(bytes([byte[0] ^ 1]))
    return to


def test_each_batch_is_of_one_shape_and_its_samples_are_of_that_bucket(stored):
    data, order = opened(stored)
    height, width = data.index.numbers("height"), data.index.numbers("width")
    seen = set()
    for t, batch in enumerate(latent_batches(OrderedSource([data], order, last_step=order.steps_in(1)))):
        h, w = batch.mean_BChw.shape[2] * 8, batch.mean_BChw.shape[3] * 8
        assert {(int(height[one.index]), int(width[one.index])) for one in batch.ids} == {(h, w)}
        assert len(batch.ids) == order.batch_size(t)
        assert batch.given.size_B6[:, 4:].tolist() == [[h, w]] * len(batch.ids)
        seen.add((h, w))
    assert len(seen) == 4


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_join_to_the_same_batches_and_go_on_where_another_stopped(stored, world):
    data, order = opened(stored)
    whole = list(latent_batches(OrderedSource([data], order, last_step=12), encoders=["clip"]))
    ranks = [
        latent_batches(OrderedSource([data], order, rank=r, world=world, first_step=5, last_step=12), encoders=["clip"])
        for r in range(world)
    ]
    for expected, parts in zip(whole[5:], zip(*ranks, strict=True), strict=True):
        assert [one for part in parts for one in part.ids] == expected.ids
        assert torch.equal(torch.cat([part.mean_BChw for part in parts]), expected.mean_BChw)
        assert torch.equal(
            torch.cat([part.given.texts[0].tokens_BLD for part in parts]), expected.given.texts[0].tokens_BLD
        )


def test_a_slice_that_is_damaged_throughout_keeps_the_shape_of_its_bucket(stored, tmp_path):
    data, _ = opened(stored)
    tall = np.flatnonzero(data.index.numbers("height") == 80)
    data, order = opened(damage(stored, tmp_path / "damaged", tall[1:]))
    damaged = 0
    for batch in latent_batches(OrderedSource([data], order, last_step=order.steps_in(1), skip_damaged=True)):
        if batch.mean_BChw.shape[2:] == (10, 6):
            broken = [one.index in tall[1:] for one in batch.ids]
            assert batch.weight_B.tolist() == [0.0 if bad else 1.0 for bad in broken]
            assert batch.mean_BChw.isfinite().all()
            damaged += len(batch.damaged)
        else:
            assert batch.weight_B.all()
    assert damaged >= len(tall) - 4
    with pytest.raises(DigestMismatch):
        list(latent_batches(OrderedSource([data], order, last_step=order.steps_in(1))))


def test_a_bucket_of_which_nothing_can_be_read_ends_the_run(stored, tmp_path):
    data, _ = opened(stored)
    tall = np.flatnonzero(data.index.numbers("height") == 80)
    data, order = opened(damage(stored, tmp_path / "damaged", tall))
    with pytest.raises(DataError, match="No sample"):
        list(latent_batches(OrderedSource([data], order, last_step=order.steps_in(1), skip_damaged=True)))


def test_a_shape_that_the_store_does_not_name_is_refused(stored):
    data = IndexedShards.open(stored, kind=latents.KIND)
    shapes = latents.describe(data.uri, data.manifest).buckets
    table = buckets.table_of(shapes[:-1], pixel_budget=4 * 64 * 64, multiple=2)
    with pytest.raises(DataError, match="18 latents .* 48x80"):
        Bucketed(data.index, data.digest, table, buckets.exact)
    assert dataclasses.asdict(table[0]) == {"size": 32, "height": 32, "width": 32, "batch": 16}
