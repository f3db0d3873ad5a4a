"""Latents in buckets of aspect ratios: each picture once, in its own shape, beside those of the same shape."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_stores import digests, opened, records, write_data
from PIL import Image

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.feed import DamageConfig
from latentray.config.precompute_latents import LatentBucketsConfig, PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import decode, latent_encoder, latents, members, precompute, shards
from latentray.data.latent_batches import latent_batches
from latentray.data.latent_plan import Shapes
from latentray.data.latent_reader import LatentReader
from latentray.data.ordering import Order
from latentray.data.pipeline import OrderedSource
from latentray.errors import AlreadyExists, ConfigError, DataError
from latentray.records import SampleId

SIZES = [
    (64, 64),
    (90, 70),
    (64, 130),
    (33, 30),
    (40, 70),
    (128, 60),
    (64, 64),
    (20, 61),
    (200, 40),
    (66, 100),
    (31, 31),
]
SIZES += [(48, 100), (110, 48)]
"""(height, width) of the pictures; the last two only need a cut."""
BUCKETS = {"sizes": [32, 64], "step": 8, "max_aspect": 2.0}
SHAPES = Shapes.of(**BUCKETS)


def sample(number: int, data: bytes | None = None, columns: bool = True) -> shards.Sample:
    """A picture of smooth noise that is the same wherever its number is."""
    height, width = SIZES[number % len(SIZES)]
    if data is None:
        pixels = np.random.default_rng(number).integers(0, 255, (height // 6, width // 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(buffer, "PNG", compress_level=1)
        data = buffer.getvalue()
    size = {"width": width, "height": height} if columns else {}
    return shards.Sample(
        key=f"{number:09d}",
        members={"png": data, "txt": f"picture {number}".encode()},
        columns={"sha256": hashlib.sha256(data).digest(), **size},
    )


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("buckets")
    return {
        "data": write_data(root / "data", [sample(i) for i in range(len(SIZES))], per_shard=8),
        "autoencoder_from": tiny.write_autoencoder(str(root / "autoencoder")),
        "text_encoder": TextEncoderConfig(source=tiny.write_text_encoder(str(root / "text"))),
    }


def config(made, out, **changes) -> PrecomputeLatents:
    values = made | {"out": str(out), "batch_size": 4, "device": "cpu", "buckets": LatentBucketsConfig(**BUCKETS)}
    return PrecomputeLatents(**(values | changes))


def shape_of(number: int) -> tuple[int, int]:
    height, width = SIZES[number % len(SIZES)]
    return SHAPES.all[int(SHAPES.assign([width], [height])[0])]


def test_a_record_is_its_very_crop_encoded_alone(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path))
    net = build.autoencoder_artifact(made["autoencoder_from"]).load()
    found = records(uri)
    assert set(found) == {f"{i:09d}_0" for i in range(len(SIZES))}
    assert len({shape_of(i) for i in range(len(SIZES))}) >= 6
    for number, size in enumerate(SIZES):
        record, shape = found[f"{number:09d}_0"], shape_of(number)
        crop = decode.to_size(decode.decode(sample(number).members["png"]), *shape)
        expected = net.encode(decode.to_tensor(crop[None]))
        tensors = record["latent.safetensors"]
        torch.testing.assert_close(tensors["mean"], expected.mean_BChw[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(tensors["logvar"], expected.logvar_BChw[0], rtol=0, atol=1e-5)
        about = record["json"]
        assert (about["original_size"], about["target_size"]) == (list(size), list(shape))
        scale = max(shape[0] / size[0], shape[1] / size[1])
        left_over = [max(round(side * scale) - wanted, 0) for side, wanted in zip(size, shape, strict=True)]
        assert about["crop_top_left"] == [one // 2 for one in left_over]


def test_index_and_manifest_say_the_shapes_and_neighbours_share_one(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path))
    described, held = latents.describe(uri), opened(uri)
    assert described.buckets == SHAPES.all and described.size == 64
    assert manifest.read(uri).meta["buckets"] == [list(shape) for shape in SHAPES.all]
    stored = list(zip(held.column("height").to_pylist(), held.column("width").to_pylist(), strict=True))
    sources = [int(held.key(x).split("_")[0]) for x in range(held.count)]
    assert stored == [shape_of(number) for number in sources]
    for shard in range(len(held.shards)):
        rows = held.index.rows_of(shard)
        place = [(SHAPES.all.index(stored[x]), sources[x]) for x in rows]
        assert place == sorted(place) and len(set(place)) == len(rows)


def test_stage_2_reads_every_shape_and_what_sdxl_conditions_on(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path, flip_variants=True))
    held = opened(uri)
    stored = list(zip(held.column("height").to_pylist(), held.column("width").to_pylist(), strict=True))
    ids = [SampleId(epoch=0, dataset=0, index=x) for x in range(held.count)]
    rows, damage = LatentReader([held]).read(ids)
    assert damage == [None] * held.count
    seen = {place: tuple(t.shape) for one in rows for place, t in zip(one.places, one.tensors["mean"], strict=True)}
    assert seen == {place: (4, height // 8, width // 8) for place, (height, width) in enumerate(stored)}
    alone = [x for x in range(held.count) if stored[x] == (64, 64)]
    source = OrderedSource([held], Order.of(held.count, 0, 1), last_step=held.count)
    for batch in latent_batches(source):
        x = batch.ids[0].index
        about = members.decode_sample(held.read(x))["json"]
        told = [*about["original_size"], *about["crop_top_left"], *about["target_size"]]
        assert batch.given.size_B6.tolist() == [told] and tuple(told[4:]) == stored[x]
    assert len(alone) >= 4


def test_every_unit_is_encoded_once_and_in_one_canonical_batch_of_its_shape(made, tmp_path, in_process, monkeypatch):
    seen = []
    encode = latent_encoder.Encoder.latents

    def counted(self, pixels):
        seen.append(tuple(pixels.shape))
        forward = self.autoencoder.encode
        self.autoencoder.encode = lambda x: seen.append(tuple(x.shape)) or forward(x)
        try:
            return encode(self, pixels)
        finally:
            self.autoencoder.encode = forward

    monkeypatch.setattr(latent_encoder.Encoder, "latents", counted)
    (uri,) = precompute.precompute(config(made, tmp_path, crops=2))
    pixels = [shape for shape in seen if shape[-1] == 3]
    batches = [shape for shape in seen if shape[-1] != 3]
    assert sum(shape[0] for shape in pixels) == 2 * len(SIZES) == manifest.read(uri).meta["encoded"]
    assert {shape[:2] for shape in batches} == {(4, 3)}  # batch_size pictures of three colours, however few there are
    assert {shape[2:] for shape in batches} == {shape_of(i) for i in range(len(SIZES))}
    units = [unit for part in in_process for unit in part.units.tolist()]
    assert len(units) == len(set(units)) == 2 * len(SIZES)


def test_the_order_in_which_parts_are_encoded_changes_no_byte(made, tmp_path, in_process, monkeypatch):
    (whole,) = precompute.precompute(config(made, tmp_path / "whole", crops=2, flip_variants=True))
    run = precompute._run

    def reversed_(config, job, work):
        for one in work:
            one.left.reverse()
        return run(config, job, list(work)[::-1])

    monkeypatch.setattr(precompute, "_run", reversed_)
    (again,) = precompute.precompute(config(made, tmp_path / "again", crops=2, flip_variants=True))
    assert digests(again) == digests(whole) and manifest.read(again).digest == manifest.read(whole).digest


def test_variants_are_cut_along_the_excess_and_mirrored(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path, crops=3, flip_variants=True))
    found = records(uri)
    assert len(found) == 6 * len(SIZES)
    net = build.autoencoder_artifact(made["autoencoder_from"]).load()
    for number in (11, 12):
        pixels, shape = decode.decode(sample(number).members["png"]), shape_of(number)
        places = []
        for variant in range(6):
            about = found[f"{number:09d}_{variant}"]["json"]
            (top, left), seen = about["crop_top_left"], pixels[:, ::-1] if about["flip"] else pixels
            crop = np.ascontiguousarray(seen[top : top + shape[0], left : left + shape[1]])
            expected = net.encode(decode.to_tensor(crop[None])).mean_BChw[0]
            mean = found[f"{number:09d}_{variant}"]["latent.safetensors"]["mean"]
            torch.testing.assert_close(mean, expected, rtol=0, atol=1e-5)
            places.append((top, left))
        excess = [side - wanted for side, wanted in zip(SIZES[number], shape, strict=True)]
        assert places[0] == (excess[0] // 2, excess[1] // 2) and len({places[i] for i in (0, 2, 4)}) == 3
        assert all(places[i + 1] == (places[i][0], excess[1] - places[i][1]) for i in (0, 2, 4))


def test_of_a_data_set_that_grew_only_the_new_is_encoded(made, tmp_path, in_process):
    precompute.precompute(config(made, tmp_path / "old", flip_variants=True))
    grown = write_data(tmp_path / "grown", [sample(i) for i in (101, *range(len(SIZES)), 102)], per_shard=6)
    changed = made | {"data": grown}
    with pytest.raises(AlreadyExists, match="before it changed"):
        precompute.precompute(config(changed, tmp_path / "old", flip_variants=True))
    (anew,) = precompute.precompute(config(changed, tmp_path / "anew", flip_variants=True))
    (uri,) = precompute.precompute(config(changed, tmp_path / "new", flip_variants=True, reuse=str(tmp_path / "old")))
    meta = manifest.read(uri).meta
    assert (meta["encoded"], meta["copied"]) == (4, 2 * len(SIZES))
    assert digests(uri) == digests(anew)


def test_another_table_of_buckets_shares_the_shapes_that_stayed(made, tmp_path, in_process):
    precompute.precompute(config(made, tmp_path / "old"))
    fewer = LatentBucketsConfig(**BUCKETS | {"sizes": [64]})
    with pytest.raises(AlreadyExists):
        precompute.precompute(config(made, tmp_path / "old", buckets=fewer))
    (anew,) = precompute.precompute(config(made, tmp_path / "anew", buckets=fewer))
    (uri,) = precompute.precompute(config(made, tmp_path / "new", buckets=fewer, reuse=str(tmp_path / "old")))
    only = Shapes.of([64], step=8, max_aspect=2.0)
    same = sum(only.all[int(only.assign([w], [h])[0])] == shape_of(i) for i, (h, w) in enumerate(SIZES))
    assert 0 < same < len(SIZES)
    assert (manifest.read(uri).meta["copied"], manifest.read(uri).meta["encoded"]) == (same, len(SIZES) - same)
    assert digests(uri) == digests(anew)


def test_damaged_pictures_are_left_out_of_their_bucket(made, tmp_path, in_process):
    samples = [sample(i, data=sample(i).members["png"][:150] if i in (2, 5) else None) for i in range(len(SIZES))]
    spoilt = made | {"data": write_data(tmp_path / "data", samples, per_shard=8)}
    with pytest.raises(DataError, match="cannot be used"):
        precompute.precompute(config(spoilt, tmp_path / "out"))
    skip = DamageConfig(policy="skip", max_bad_fraction=0.25)
    (uri,) = precompute.precompute(config(spoilt, tmp_path / "out", damage=skip))
    assert set(records(uri)) == {f"{i:09d}_0" for i in range(len(SIZES)) if i not in (2, 5)}
    listed = [json.loads(line) for line in (Path(uri) / "rejected.jsonl").read_text().splitlines()]
    assert [one["key"] for one in listed] == ["000000002", "000000005"]


def test_an_estimate_meets_several_shapes(made, tmp_path, in_process, capsys):
    assert precompute.precompute(config(made, tmp_path / "out", estimate=True)) == []
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert any("full, the rest is padding" in line for line in lines)
    (uri,) = precompute.precompute(config(made, tmp_path / "out"))
    stored = sum(entry.size for name, entry in manifest.read(uri).files.items() if name.endswith(".tar"))
    assert found["records"] == len(SIZES) and found["bytes"] == pytest.approx(stored, rel=0.5)


def test_room_is_asked_for_by_the_shapes_there_are(made, tmp_path, in_process, monkeypatch):
    needed = []
    monkeypatch.setattr(store, "require_space", lambda uri, need: needed.append(need))
    (uri,) = precompute.precompute(config(made, tmp_path, text_encoder=None))
    stored = sum(entry.size for name, entry in manifest.read(uri).files.items() if name.endswith(".tar"))
    assert needed[0] == pytest.approx(stored, rel=0.5)


def test_what_does_not_fit_is_refused_before_anything_is_encoded(made, tmp_path, in_process):
    for changes, where in (
        ({"buckets": LatentBucketsConfig(sizes=[60], step=12)}, "buckets.step"),  # 8 does not divide it
        ({"buckets": LatentBucketsConfig(sizes=[2048, 4096], step=8)}, "buckets.step"),  # more than 256
    ):
        with pytest.raises(ConfigError) as caught:
            precompute.precompute(config(made, tmp_path / "out", **changes))
        assert caught.value.where == where
    bare = made | {"data": write_data(tmp_path / "bare", [sample(i, columns=False) for i in range(3)], per_shard=8)}
    with pytest.raises(DataError, match="how large"):
        precompute.precompute(config(bare, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["buckets.sizes=[256]", "sizes=[256]"], "sizes, buckets.sizes"),
        (["buckets.sizes=[250]"], "buckets.sizes"),
        (["buckets.sizes=[256,256]"], "buckets.sizes"),
        (["buckets.step=0"], "buckets.step"),
        (["buckets.max_aspect=0.9"], "buckets.max_aspect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, where):
    needed = ["data=d", "autoencoder_from=a", "out=o", "text_encoder.source=t"]
    with pytest.raises(ConfigError) as caught:
        compose.load("precompute_latents", PrecomputeLatents, needed + overrides)
    assert caught.value.where == where and caught.value.mend
