"""One of ten shards is damaged: the run fails at once and names it, or counts each lost sample and goes on without it."""

import io
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from latentray.checkpoint import manifest
from latentray.data import damage, index, shards
from latentray.data.latent_batches import latent_batches
from latentray.data.ordering import Order
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource
from latentray.data.stream import stream_batches
from latentray.data.transforms import Augment
from latentray.errors import DataError, DigestMismatch, UnsafeMember

SHARDS, EACH, B, VICTIM = 10, 6, 12, 4


def cut_inside_a_member(path, data, entry):
    path.write_bytes(data[: 3 * len(data) // 8 + 100])


def cut_at_a_member_boundary(path, data, entry):
    path.write_bytes(data[: 3 * (len(data) - 10_240 % len(data)) // EACH // 512 * 512])


def flip_a_header_byte(path, data, entry):
    path.write_bytes(data[:124] + bytes([data[124] ^ 1]) + data[125:])


def empty(path, data, entry):
    path.write_bytes(b"")


def remove(path, data, entry):
    path.unlink()


def swap(path, data, entry):
    path.write_bytes(path.with_name("00005.tar").read_bytes())  # whole and readable, but another shard


DAMAGES = [cut_inside_a_member, cut_at_a_member_boundary, flip_a_header_byte, empty, remove, swap]


def picture(i: int) -> shards.Sample:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 40 + 3 * i, np.uint8)).save(buffer, "PNG")
    return shards.Sample(key=f"{i:05d}", members={"png": buffer.getvalue(), "txt": b"x", "json": b"{}"})


def latent(i: int) -> shards.Sample:
    tensors = {"mean": torch.full((4, 2, 2), float(i)), "logvar": torch.zeros(4, 2, 2)}
    tensors |= {
        "text.clip.tokens": torch.full((1, 3, 5), float(i)),
        "text.clip.mask": torch.ones(1, 3, dtype=torch.uint8),
        "text.clip.pooled": torch.full((1, 5), float(i)),
    }
    return shards.Sample(
        key=f"{i:05d}_0", members={"latent.safetensors": safetensors.torch.save(tensors), "json": b"{}"}
    )


KINDS = {"dataset": picture, "latents": latent}


def publish(root, kind):
    folder, make = root / "built", KINDS[kind]
    folder.mkdir(parents=True)
    made = [
        shards.write_shard([make(n * EACH + i) for i in range(EACH)], folder / shards.shard_name(n))
        for n in range(SHARDS)
    ]
    index.write(made, folder / index.NAME)
    manifest.publish(folder, root / "set", kind=kind)
    return root / "set"


def batches(uri, kind, *, skip, steps=2 * SHARDS * EACH // B, workers=0):
    data = shards.IndexedShards.open(uri, kind=kind)
    order = Order.of(data.count, 3, B, digest=data.digest)
    source = OrderedSource([data], order, last_step=steps, skip_damaged=skip)
    if kind == "dataset":
        return data, picture_batches(source, shapes=[(16, 16)], augment=Augment(), workers=workers)
    return data, latent_batches(source, workers=workers, encoders=["clip"])


def values(batch):
    return batch.x_BCHW[:, 0, 0, 0] if hasattr(batch, "x_BCHW") else batch.mean_BChw[:, 0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", DAMAGES)
def test_damage_is_an_error_that_names_the_shard_at_once(tmp_path, kind, harm):
    uri = publish(tmp_path, kind)
    path = uri / shards.shard_name(VICTIM)
    harm(path, path.read_bytes(), None)
    began = time.perf_counter()
    with pytest.raises(DigestMismatch) as caught:
        list(batches(uri, kind, skip=False)[1])
    assert caught.value.where.endswith(path.name)
    assert time.perf_counter() - began < 5
    with pytest.raises(DigestMismatch) as caught:
        shards.IndexedShards.open(uri, kind=kind).verify()
    assert caught.value.where.endswith(path.name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", DAMAGES)
def test_skipped_damage_is_counted_exactly_and_the_rest_is_trained_on(tmp_path, kind, harm):
    uri = publish(tmp_path, kind)
    whole = {one.ids[row]: value for one in batches(uri, kind, skip=False)[1] for row, value in enumerate(values(one))}
    path = uri / shards.shard_name(VICTIM)
    harm(path, path.read_bytes(), None)
    data, made = batches(uri, kind, skip=True)
    lost = set(data.index.rows_of(VICTIM))
    if harm in (cut_inside_a_member, cut_at_a_member_boundary):
        left = path.stat().st_size
        lost = {x for x in lost if sum(data.locate(x)[1:]) > left}
        assert 0 < len(lost) < EACH
    elif harm is flip_a_header_byte:
        lost = {min(lost)}
    seen = 0
    for batch in made:
        bad = [row for row, one in enumerate(batch.ids) if one.index in lost]
        assert batch.weight_B.tolist() == [0.0 if row in bad else 1.0 for row in range(B)]
        assert sorted(one.key for one in batch.damaged) == sorted(data.key(batch.ids[row].index) for row in bad)
        assert all(one.shard.endswith(path.name) and one.reason == "digest" for one in batch.damaged)
        assert bool(torch.isfinite(values(batch)).all())
        for row, value in enumerate(values(batch)):
            assert row in bad or value == whole[batch.ids[row]]
        seen += len(batch.damaged)
    assert seen == 2 * len(lost)  # two epochs


def streamed(uri, *, digests=True, steps=None, **options):
    """Steps of a rank that goes through the shards, as their index lists them, without using it."""
    entries = shards.IndexedShards.open(uri).shards
    uris = [str(uri / entry.name) for entry in entries]
    known = {one: entry.sha256 for one, entry in zip(uris, entries, strict=True)} if digests else {}
    return stream_batches(
        uris, seed=3, global_batch=B, shape=(16, 16), augment=Augment(), sha256=known, last_step=steps, **options
    )


def first_epoch(made):
    """(shard, number, weight) of each place, and the damage, until every reader is in its second epoch."""
    places, found = [], []
    for batch in made:
        mine = [row for row, one in enumerate(batch.ids) if one.epoch == 0]
        if not mine:
            return places, found
        for row in mine:
            places.append((*divmod(batch.ids[row].index, 2**32), batch.weight_B[row].item()))
        found += [one for one in batch.damaged if len(mine) == B or one.shard not in {old.shard for old in found}]
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("harm", DAMAGES)
def test_a_stream_names_the_damaged_shard_at_once_or_counts_it_and_trains_on_the_rest(tmp_path, harm, digests):
    uri = publish(tmp_path, "dataset")
    path = uri / shards.shard_name(VICTIM)
    whole = path.read_bytes()
    harm(path, whole, None)
    if harm is swap and not digests:  # nothing but its digest tells a whole tar from another
        _, found = first_epoch(streamed(uri, digests=False))
        assert not found
        return
    began = time.perf_counter()
    with pytest.raises(DataError) as caught:
        list(streamed(uri, digests=digests, steps=SHARDS * EACH // B))
    assert caught.value.where == str(path)
    assert time.perf_counter() - began < 5
    places, found = first_epoch(streamed(uri, digests=digests, skip_damaged=True, max_bad_fraction=0.1))
    assert len(found) == 1 and found[0].shard == str(path)
    read = {(shard, number) for shard, number, weight in places if weight}
    assert len(places) == len(read) + 1  # each sample once, and the damage in a place of its own
    others = {(shard, number) for shard in range(SHARDS) if shard != VICTIM for number in range(EACH)}
    victims = read - others
    assert others <= read and victims == {(VICTIM, number) for number in range(len(victims))}
    assert f"{len(victims)} samples were read before" in found[0].what
    if harm in (cut_inside_a_member, cut_at_a_member_boundary) and not digests:
        assert 0 < len(victims) < EACH
    else:
        assert not victims
    expected = {remove: "missing"}.get(harm, "digest" if digests else "damaged_tar")
    assert found[0].reason == expected
    with pytest.raises(DataError, match=r"1 of 10 tars.*max_bad_fraction is 0.09") as ended:
        list(streamed(uri, digests=digests, skip_damaged=True, max_bad_fraction=0.09, steps=50))
    assert ended.value.where == str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", DAMAGES)
def test_the_run_ends_where_more_is_damaged_than_allowed(tmp_path, kind, harm):
    uri = publish(tmp_path, kind)
    path = uri / shards.shard_name(VICTIM)
    harm(path, path.read_bytes(), None)
    data, made = batches(uri, kind, skip=True, steps=SHARDS * EACH // B)
    lost = sum(len(batch.damaged) for batch in made)
    assert 0 < lost <= EACH
    damage.require_few(lost, samples=data.count, allowed=lost / data.count)
    with pytest.raises(DataError, match=f"{lost} of {data.count} samples are damaged"):
        damage.require_few(lost, samples=data.count, allowed=(lost - 0.5) / data.count)


def test_loader_workers_skip_the_same(tmp_path):
    uri = publish(tmp_path, "dataset")
    remove(uri / shards.shard_name(VICTIM), None, None)
    one, other = (list(batches(uri, "dataset", skip=True, workers=workers)[1]) for workers in (0, 2))
    for a, b in zip(one, other, strict=True):
        assert (a.ids, a.damaged) == (b.ids, b.damaged)
        assert torch.equal(a.weight_B, b.weight_B)
        assert torch.equal(a.x_BCHW, b.x_BCHW)


def test_a_slice_without_one_good_sample_still_has_its_shape(tmp_path):
    uri = publish(tmp_path, "latents")
    for n in range(SHARDS - 1):
        (uri / shards.shard_name(n)).unlink()
    for batch in batches(uri, "latents", skip=True, steps=3)[1]:
        assert batch.mean_BChw.shape == (B, 4, 2, 2)
        assert batch.given.texts[0].mask_BL.all()
        assert batch.weight_B.sum() + len(batch.damaged) == B


def test_a_picture_that_does_not_decode_is_damage_and_code_is_not(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()
    good = [picture(i) for i in range(B - 1)]
    bad = shards.Sample(key="bad", members={"png": b"\x89PNG\r\n\x1a\nnothing", "txt": b"x", "json": b"{}"})
    index.write([shards.write_shard([*good, bad], folder / "00000.tar")], folder / index.NAME)
    manifest.publish(folder, tmp_path / "set", kind="dataset")
    _, made = batches(tmp_path / "set", "dataset", skip=True, steps=1)
    (batch,) = made
    assert [(one.key, one.reason) for one in batch.damaged] == [("bad", "decode")]
    place = {"__id__": 1, "__step__": 0, "__bucket__": 0, "__traffic__": None}
    with pytest.raises(UnsafeMember):
        damage.damaged(UnsafeMember("x"), place)


def test_too_much_damage_ends_the_run():
    damage.require_few(3, samples=1000, allowed=0.003)
    with pytest.raises(DataError, match="4 of 1000") as caught:
        damage.require_few(4, samples=1000, allowed=0.003)
    assert "max_bad_fraction" in caught.value.where
