"""Reading a part: what a size gets does not depend on the others, and an attack is never passed over as damage."""

import dataclasses
import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from latentray.checkpoint import manifest
from latentray.data import decode, index, latent_parts, latent_plan, latent_sources, members, shards
from latentray.data.latent_parts import FROM_PIXELS, Job, SplitJob
from latentray.data.latent_plan import Part
from latentray.errors import DataError, DigestMismatch, InputMissing, SampleRejected, UnsafeMember


def jpeg(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(height).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


PICTURES = [jpeg(*shape) for shape in ((64, 64), (128, 160), (400, 144), (90, 70), (8, 8))]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> SplitJob:
    root = tmp_path_factory.mktemp("parts")
    samples = [
        shards.Sample(
            key=f"k{i}", members={"jpg": data, "txt": b"x"}, columns={"sha256": hashlib.sha256(data).digest()}
        )
        for i, data in enumerate(PICTURES)
    ]
    (root / "built").mkdir()
    index.write([shards.write_shard(samples, root / "built" / shards.shard_name(0))], root / "built" / index.NAME)
    uri = str(root / "data")
    digest = manifest.publish(root / "built", uri, kind="dataset").digest
    return SplitJob(data=uri, data_digest=digest, outs=("unused",), older=(), parts="unused", plan="0" * 64)


def job(split: SplitJob, sizes: tuple[int, ...], **changes) -> Job:
    values = dict(
        splits=(split,), samples=len(PICTURES), autoencoder="", texts=(), variants=(0, 1), batch_size=4, window=None,
        shapes=(tuple((size, size) for size in sizes),),
        latent_dtype="float32", text_dtype="float32", max_pixels=10**6, skip_damaged=False, device="cpu",
    )  # fmt: skip
    return Job(**values | changes)


def part(units: np.ndarray, sizes: int = 1) -> Part:
    return Part(split=0, shard=0, number=0, bucket=0, units=units, older=np.empty((0, sizes), np.int64))


UNITS = latent_plan.units_of(range(len(PICTURES)), (0, 1))


@pytest.mark.parametrize("sizes", [(8, 16), (64, 72, 8), (24, 64), (72, 16, 8), (8, 16, 24, 64, 72)])
def test_what_a_size_gets_does_not_depend_on_the_others(split, sizes):
    together = latent_parts.read_part(job(split, tuple(sizes)), part(UNITS, len(sizes)))
    for number, size in enumerate(sizes):
        alone = latent_parts.read_part(job(split, (size,)), part(UNITS))
        assert torch.equal(together.tensors[f"pixels.{number}"], alone.tensors["pixels.0"])
        for both, one in zip(together.about["units"], alone.about["units"], strict=True):
            assert both["json"][number] == one["json"][0]


def test_pixels_are_those_of_the_decoder_at_the_least_scale(split):
    got = latent_parts.read_part(job(split, (64,)), part(UNITS))
    assert got.tensors["pixels.0"].shape == (2 * len(PICTURES), 64, 64, 3)
    for row, data in enumerate(PICTURES):
        pixels, original = decode.decode_at_least(data, 64, 64)
        unit = got.about["units"][2 * row]
        assert (unit["key"], unit["from"], unit["unit"]) == (f"k{row}_0", FROM_PIXELS, row * latent_plan.VARIANTS)
        assert unit["sha256"] == hashlib.sha256(data).hexdigest()
        assert unit["json"][0]["original_size"] == list(original) == list(decode.decode(data).shape[:2])
        square = latent_plan.cut(pixels, original, (64, 64), 0, bytes.fromhex(unit["sha256"]))
        np.testing.assert_array_equal(got.tensors["pixels.0"][2 * row].numpy(), square.pixels)


def test_pictures_above_the_limit_are_rejected_before_they_are_decoded(split):
    with pytest.raises(DataError, match="'k2' cannot be used: 144 x 400 pixels"):
        latent_parts.read_part(job(split, (64,), max_pixels=50_000), part(UNITS))
    got = latent_parts.read_part(job(split, (64,), max_pixels=50_000, skip_damaged=True), part(UNITS))
    assert [(one["key"], one["reason"]) for one in got.about["rejected"]] == [("k2", "too_many_pixels")]
    assert {unit["key"] for unit in got.about["units"]} == {f"k{i}_{v}" for i in (0, 1, 3, 4) for v in (0, 1)}


@pytest.mark.parametrize("skip", [True, False])
def test_an_attack_or_a_missing_input_is_no_damage(split, skip):
    source = shards.IndexedShards.open(split.data)
    for error in (UnsafeMember("x"), InputMissing("x")):
        with pytest.raises(type(error)):
            latent_parts.rejection(error, source, 0, skip=skip)


def test_damage_is_named_by_its_reason(split):
    source = shards.IndexedShards.open(split.data)
    for error, reason in (
        (DigestMismatch("x"), "digest"), (DataError("x"), "decode"), (SampleRejected("format", "x"), "format"),
    ):  # fmt: skip
        found = latent_parts.rejection(error, source, 3, skip=True)
        assert (found.reason, found.shard, found.key) == (reason, "00000.tar", "k3")


def test_data_that_changed_under_the_job_is_refused(split):
    changed = dataclasses.replace(split, data_digest="0" * 64)
    with pytest.raises(DigestMismatch, match="changed while it was read"):
        latent_parts.read_part(job(changed, (64,)), part(UNITS))


def test_only_texts_leaves_the_picture_out(split):
    raw = shards.IndexedShards.open(split.data).read(0)
    assert set(latent_sources.only_texts(raw)) == {"__key__", "__url__", "txt"}
    assert members.captions_of(members.decode_sample(latent_sources.only_texts(raw))) == ["x"]
