"""Batches: the same numbers for any world and any number of loader workers; damage is an error, not a gap."""

import io
import json
import multiprocessing
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from latentray.checkpoint import manifest
from latentray.data import index, shards
from latentray.data.buckets import Bucket, Bucketed
from latentray.data.latent_batches import latent_batches
from latentray.data.ordering import Order
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource, raw_pipeline
from latentray.data.transforms import Augment
from latentray.errors import ConfigError, DataError, DigestMismatch

N, B = 10, 4


def png(value: int) -> bytes:
    pixels = np.zeros((20, 16, 3), np.uint8)
    pixels[:, :8] = value  # brighter on the left: a mirrored picture shows
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def publish(folder, uri, made, kind):
    folder.mkdir()
    halves = [shards.write_shard(made[i::2], folder / shards.shard_name(i)) for i in range(2)]
    index.write(halves, folder / index.NAME)
    manifest.publish(folder, uri, kind=kind)
    return shards.IndexedShards.open(uri, kind=kind)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    about = [json.dumps({"captions": [f"first {i}", f"second {i}"], "value": 20 * i + 20}).encode() for i in range(N)]
    made = [
        shards.Sample(key=f"{i:09d}", members={"png": png(20 * i + 20), "txt": b"x", "json": about[i]})
        for i in range(N)
    ]
    return publish(root / "built", root / "set", made, "dataset")


def latent_sample(i: int, encoders: tuple[str, ...] = ("clip",)) -> shards.Sample:
    captions = 1 + i % 3
    tensors = {
        "mean": torch.full((4, 2, 2), float(i), dtype=torch.bfloat16),
        "logvar": torch.full((4, 2, 2), -float(i)),
    }
    for encoder in encoders:
        tensors[f"text.{encoder}.tokens"] = torch.arange(captions)[:, None, None].expand(captions, 3, 5) + 10.0 * i
        tensors[f"text.{encoder}.mask"] = torch.ones(captions, 3, dtype=torch.uint8)
        tensors[f"text.{encoder}.pooled"] = torch.arange(captions)[:, None].expand(captions, 5) + 10.0 * i
    data = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    return shards.Sample(key=f"{i:09d}_0", members={"latent.safetensors": data, "json": b"{}"})


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    return publish(root / "built", root / "set", [latent_sample(i) for i in range(N)], "latents")


def picture_run(data, *, workers=0, world=1, rank=0, first=0, last=6, **options):
    options = {"shapes": [(16, 16)], "augment": Augment(flip=True)} | options
    source = OrderedSource([data], Order.of(data.count, 3, B), rank=rank, world=world, first_step=first, last_step=last)
    return list(picture_batches(source, workers=workers, **options))


def test_batches_follow_the_order_and_hold_the_right_pixels(pictures):
    order = Order.of(N, 3, B)
    batches = picture_run(pictures, augment=Augment())
    assert [batch.ids for batch in batches] == [order.step(k).ids for k in range(6)]
    for batch in batches:
        assert batch.x_BCHW.shape == (B, 3, 16, 16)
        assert batch.x_BCHW.dtype == torch.float32
        for x, i in zip(batch.x_BCHW, batch.ids, strict=True):
            value = json.loads(pictures.read(i.index)["json"])["value"]
            torch.testing.assert_close(x[:, :, :8], torch.full((3, 16, 8), value / 127.5 - 1))
            assert (x[:, :, 8:] == -1).all()


def test_each_picture_once_an_epoch(pictures):
    ids = [i for batch in picture_run(pictures, last=5) for i in batch.ids]
    assert sorted((i.epoch, i.index) for i in ids) == [(e, x) for e in (0, 1) for x in range(N)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_loader_workers_change_nothing(pictures, workers):
    for one, other in zip(picture_run(pictures), picture_run(pictures, workers=workers), strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.x_BCHW, other.x_BCHW)
        assert torch.equal(one.size_B6, other.size_B6)
        assert one.captions == other.captions


def test_ranks_join_to_the_whole_batch_and_a_resumed_run_continues(pictures):
    whole = picture_run(pictures)
    halves = [picture_run(pictures, world=2, rank=r) for r in range(2)]
    for k, batch in enumerate(whole):
        assert torch.equal(batch.x_BCHW, torch.cat([half[k].x_BCHW for half in halves]))
    assert torch.equal(picture_run(pictures, first=4)[0].x_BCHW, whole[4].x_BCHW)


def test_flips_and_captions_are_drawn_per_sample_and_epoch(pictures):
    drawn = picture_run(pictures, last=60)
    flips = [(x[:, :, 8:] > -1).all().item() for batch in drawn for x in batch.x_BCHW]
    assert 0.35 < np.mean(flips) < 0.65
    firsts = [text.startswith("first") for batch in drawn for text in batch.captions]
    assert 0.35 < np.mean(firsts) < 0.65
    for batch in drawn[:5]:
        assert [text.split()[1] for text in batch.captions] == [
            pictures.key(i.index).lstrip("0") or "0" for i in batch.ids
        ]


def test_without_an_end_it_never_ends(pictures):
    order = Order.of(N, 3, B)
    source = OrderedSource([pictures], order, first_step=1000)
    batches = picture_batches(source, shapes=[(16, 16)], augment=Augment(), workers=2)
    assert next(batches).ids == order.step(1000).ids
    assert next(batches).ids == order.step(1001).ids
    batches.close()


def latent_run(data, workers=0, encoders=("clip",)):
    source = OrderedSource([data], Order.of(data.count, 3, B), last_step=6)
    return list(latent_batches(source, workers=workers, encoders=encoders))


def test_latents_and_their_drawn_captions(latents):
    seen = set()
    for batch in latent_run(latents):
        assert batch.mean_BChw.dtype == torch.float32
        (text,) = batch.given.texts
        assert text.mask_BL.dtype == torch.bool
        assert text.tokens_BLD.shape == (B, 3, 5)
        for row, i in enumerate(batch.ids):
            number = int(latents.key(i.index).split("_")[0])
            assert (batch.mean_BChw[row] == number).all()
            assert (batch.logvar_BChw[row] == -number).all()
            choice = text.pooled_BD[row, 0].item() - 10 * number
            assert 0 <= choice <= number % 3
            assert (text.tokens_BLD[row] == 10 * number + choice).all()
            seen.add((number % 3, choice))
    assert {(2, 0), (2, 1), (2, 2)} & seen
    assert (0, 0) in seen


def test_loader_workers_change_no_latent(latents):
    for one, other in zip(latent_run(latents), latent_run(latents, workers=2), strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.mean_BChw, other.mean_BChw)
        assert torch.equal(one.given.texts[0].tokens_BLD, other.given.texts[0].tokens_BLD)


def test_the_encoders_asked_for_come_in_their_order_with_the_same_caption(tmp_path):
    made = [latent_sample(i, encoders=("clip", "t5")) for i in range(4)]
    data = publish(tmp_path / "built", tmp_path / "set", made, "latents")
    for both, one, none in zip(
        latent_run(data, encoders=("t5", "clip")), latent_run(data, encoders=("clip",)), latent_run(data, encoders=()),
        strict=True,
    ):  # fmt: skip
        assert [len(batch.given.texts) for batch in (both, one, none)] == [2, 1, 0]
        assert torch.equal(both.given.texts[1].tokens_BLD, one.given.texts[0].tokens_BLD)
        assert torch.equal(both.given.texts[0].pooled_BD, both.given.texts[1].pooled_BD), "one caption for both"
        assert torch.equal(both.mean_BChw, none.mean_BChw)
    with pytest.raises(DataError, match=r"text\.x"):
        latent_run(data, encoders=("x",))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_an_error_that_names_the_sample(tmp_path, workers):
    made = [shards.Sample(key=f"{i:09d}", members={"png": png(20), "txt": b"x"}) for i in range(N)]
    data = publish(tmp_path / "built", tmp_path / "set", made, "dataset")
    entry, offset, _ = data.locate(3)
    path = tmp_path / "set" / entry.name
    damaged = bytearray(path.read_bytes())
    damaged[offset + 520] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(DigestMismatch) as caught:
        picture_run(data, workers=workers)
    assert f"'{data.key(3)}'" in caught.value.what
    assert caught.value.where.endswith(entry.name)
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()  # though `caught` holds every frame of the traceback


def test_what_does_not_fit_is_refused(pictures, latents):
    with pytest.raises(ConfigError):
        picture_run(pictures, world=3)
    with pytest.raises(DataError, match="no picture"):
        picture_run(latents)
    with pytest.raises(DataError, match="no latent"):
        latent_run(pictures)
    with pytest.raises(DataError, match="order is of"):
        OrderedSource([latents], Order.of(N + 1, 0, B))


def test_the_pipeline_can_be_sent_to_a_fresh_process(pictures):
    source = OrderedSource([pictures], Order.of(N, 3, B), rank=0, world=1, first_step=2, last_step=3)
    stages = raw_pipeline(source)
    sent = pickle.loads(pickle.dumps(stages))
    assert [s["__id__"] for s in sent] == [s["__id__"] for s in stages] == Order.of(N, 3, B).step(2).ids


def test_each_bucket_has_its_shape_and_tells_what_was_cut(tmp_path):
    made = [
        shards.Sample(key=f"{i:03d}", members={"png": png(20), "txt": b"x"}, columns={"width": 16, "height": 20})
        for i in range(N)
    ]
    data = publish(tmp_path / "built", tmp_path / "set", made, "dataset")
    shapes = [(8, 8), (16, 8)]  # the pictures, 20 x 16, are nearer to the square
    table = tuple(Bucket(size=8, height=h, width=w, batch=B) for h, w in shapes)
    order = Order((Bucketed(data.index, data.digest, table),), 3, (B, B))
    source = OrderedSource([data], order, last_step=3)
    for batch in picture_batches(source, shapes=shapes, augment=Augment(crop="random")):
        assert batch.x_BCHW.shape == (B, 3, 8, 8)
        assert (batch.size_B6[:, :2] == torch.tensor([20.0, 16.0])).all()
        assert (batch.size_B6[:, 4:] == 8).all()
        assert set(batch.size_B6[:, 2].tolist()) <= {0.0, 1.0, 2.0}  # of ten rows eight are kept
