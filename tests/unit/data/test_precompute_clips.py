"""Latents of clips: windows of frames, encoded as pictures are, in records (T, C, h, w)."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_stores import digests, opened, records, write_data

from latentray import build
from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.feed import DamageConfig
from latentray.config.precompute_latents import ClipConfig, LatentBucketsConfig, PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import (
    clips,
    decode,
    latent_encoder,
    latents,
    members,
    precompute,
    shards,
    synthetic_clips,
    synthetic_episodes,
)
from latentray.data.latent_batches import latent_batches
from latentray.data.latent_reader import LatentReader
from latentray.data.ordering import Order
from latentray.data.pipeline import OrderedSource
from latentray.errors import AlreadyExists, ConfigError, DataError, FingerprintMismatch
from latentray.records import SampleId

N, FRAMES, FPS = 5, 12, 8.0


def moving(first: int, count: int, form: str = "frames", frames: int = FRAMES) -> list[shards.Sample]:
    some = synthetic_clips.samples("train", seed=0, first=first, count=count, frames=frames, fps=FPS, form=form)
    return list(some)


def wide(number: int, height: int, width: int, frames: int = FRAMES) -> shards.Sample:
    pixels = np.random.default_rng(number).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    return clips.clip_sample(f"w{number:08d}", pixels, FPS, [f"clip {number}"])


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    return {
        "data": write_data(root / "data", moving(0, N), per_shard=3),
        "autoencoder_from": tiny.write_autoencoder(str(root / "autoencoder")),
        "text_encoder": TextEncoderConfig(source=tiny.write_text_encoder(str(root / "text"))),
    }


def config(made, out, **changes) -> PrecomputeLatents:
    values = made | {"out": str(out), "batch_size": 8, "device": "cpu", "clip": ClipConfig(frames=5, fps=4.0)}
    return PrecomputeLatents(**(values | changes))


def frames_of(one: shards.Sample) -> np.ndarray:
    return clips.read_clip(members.decode_sample({"__key__": one.key, **one.members})).frames_THWC


@pytest.mark.parametrize("form", ["frames", "mp4"])
def test_a_record_is_the_clips_window_encoded_frame_by_frame(made, tmp_path, in_process, form):
    samples = moving(0, N, form)
    given = made | {"data": write_data(tmp_path / "data", samples, per_shard=3)}
    (uri,) = precompute.precompute(config(given, tmp_path / "out"))
    net = build.autoencoder_artifact(made["autoencoder_from"]).load()
    found = records(uri)
    assert list(found) == [f"{i:09d}_0" for i in range(N)]
    for one in samples:
        record = found[f"{one.key}_0"]
        frames = frames_of(one)[[0, 2, 4, 6, 8]]  # 4 a second of 8 a second
        expected = net.encode(decode.to_tensor(frames))
        tensors = record["latent.safetensors"]
        torch.testing.assert_close(tensors["mean"], expected.mean_BChw, rtol=0, atol=1e-5)
        torch.testing.assert_close(tensors["logvar"], expected.logvar_BChw, rtol=0, atol=1e-5)
        assert tensors["mean"].shape == (5, 4, 8, 8) and tensors["text.clip.tokens"].shape == (1, 12, 16)
        about = json.loads(one.members["json"])
        assert record["json"] == {
            "captions": about["captions"], "source": one.key, "source_sha256": about["sha256"], "flip": False,
            "original_size": [64, 64], "crop_top_left": [0, 0], "target_size": [64, 64],
            "frames": 5, "fps": 4.0, "begin": 0.0,
        }  # fmt: skip


def test_index_manifest_and_reader_know_frames_and_rate(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path))
    held, described = opened(uri), latents.describe(uri)
    assert (described.frames, described.fps, described.buckets, described.size) == (5, 4.0, (), 64)
    assert held.column("frames").to_pylist() == [5] * N and held.column("fps").to_pylist() == [4.0] * N
    rows, damage = LatentReader([held]).read([SampleId(epoch=0, dataset=0, index=x) for x in range(N)])
    assert damage == [None] * N
    assert sorted(place for one in rows for place in one.places) == list(range(N))
    assert {tuple(one.tensors["mean"].shape[1:]) for one in rows} == {(5, 4, 8, 8)}
    (batch,) = latent_batches(OrderedSource([held], Order.of(held.count, 0, N), last_step=1), encoders=["clip"])
    assert batch.mean_BChw.shape == (N, 5, 4, 8, 8) and batch.given.texts[0].tokens_BLD.shape == (N, 12, 16)
    assert batch.given.size_B6.tolist() == [[64, 64, 0, 0, 64, 64]] * N
    for row, one in enumerate(batch.ids):
        record = members.decode_sample(held.read(one.index))["latent.safetensors"]
        assert torch.equal(batch.mean_BChw[row], record["mean"])


def test_frames_are_encoded_in_the_canonical_batch_and_parts_hold_what_fills_it(
    made, tmp_path, in_process, monkeypatch
):
    seen = []
    encode = latent_encoder.Encoder.__init__

    def watched(self, job):
        encode(self, job)
        forward = self.autoencoder.encode
        self.autoencoder.encode = lambda x: seen.append(tuple(x.shape)) or forward(x)

    monkeypatch.setattr(latent_encoder.Encoder, "__init__", watched)
    for batch_size, units, batches in ((8, [1, 1, 1, 1, 1], 5), (10, [2, 1, 2], 3), (3, [1, 1, 1, 1, 1], 10)):
        in_process.clear()
        seen.clear()
        precompute.precompute(config(made, tmp_path / str(batch_size), batch_size=batch_size))
        assert [len(part.units) for part in in_process] == units
        assert seen == [(batch_size, 3, 64, 64)] * batches
    one, other = (records(str(tmp_path / size / "train")) for size in ("8", "3"))
    for key, record in one.items():  # between batch sizes there is rounding, and no more
        mean = other[key]["latent.safetensors"]["mean"]
        torch.testing.assert_close(record["latent.safetensors"]["mean"], mean, rtol=0, atol=1e-5)


def test_variants_are_cuts_in_place_and_time(made, tmp_path, in_process):
    given = made | {"data": write_data(tmp_path / "data", [wide(i, 64, 96) for i in range(3)], per_shard=3)}
    (uri,) = precompute.precompute(config(given, tmp_path / "out", crops=3, flip_variants=True))
    net = build.autoencoder_artifact(made["autoencoder_from"]).load()
    found, begins = records(uri), set()
    for i in range(3):
        frames = frames_of(wide(i, 64, 96))
        for variant in range(6):
            record = found[f"w{i:08d}_{variant}"]
            about = record["json"]
            first, (top, left) = round(about["begin"] * FPS), about["crop_top_left"]
            seen = frames[:, :, ::-1] if about["flip"] else frames
            crop = seen[first : first + 10 : 2][:5, top : top + 64, left : left + 64]
            expected = net.encode(decode.to_tensor(np.ascontiguousarray(crop))).mean_BChw
            torch.testing.assert_close(record["latent.safetensors"]["mean"], expected, rtol=0, atol=1e-5)
            assert about["begin"] == 0 or variant > 1
            begins.add(first)
        assert found[f"w{i:08d}_2"]["json"]["begin"] == found[f"w{i:08d}_3"]["json"]["begin"]
    assert len(begins) >= 3


def test_clips_may_be_in_buckets_or_of_several_sizes(made, tmp_path, in_process):
    shapes = [(64, 96), (64, 64), (96, 64), (64, 100)]
    given = made | {
        "data": write_data(tmp_path / "data", [wide(i, *shape) for i, shape in enumerate(shapes)], per_shard=3)
    }
    buckets = LatentBucketsConfig(sizes=[64], step=16, max_aspect=2.0)
    (uri,) = precompute.precompute(config(given, tmp_path / "buckets", buckets=buckets))
    held = opened(uri)
    stored = {held.key(x)[:9]: (held.column("height")[x].as_py(), held.column("width")[x].as_py()) for x in range(4)}
    assert stored == {
        "w00000000": (48, 80), "w00000001": (64, 64), "w00000002": (80, 48), "w00000003": (48, 80)
    }  # fmt: skip
    assert records(uri)["w00000002_0"]["latent.safetensors"]["mean"].shape == (5, 4, 10, 6)
    both = precompute.precompute(config(given, tmp_path / "both", sizes=[64, 32]))
    for uri, side in zip(both, (8, 4), strict=True):
        assert {one["latent.safetensors"]["mean"].shape for one in records(uri).values()} == {(5, 4, side, side)}


def test_the_clips_own_rate_is_taken_where_all_have_the_same(made, tmp_path, in_process):
    (uri,) = precompute.precompute(config(made, tmp_path / "own", clip=ClipConfig(frames=5)))
    assert latents.describe(uri).fps == FPS and records(uri)["000000000_0"]["json"]["fps"] == FPS
    other = clips.clip_sample("x", frames_of(moving(0, 1)[0]), 6.0, ["slow"])
    mixed = made | {"data": write_data(tmp_path / "mixed", [*moving(0, 2), other], per_shard=3)}
    with pytest.raises(ConfigError, match="6 to 8 per second") as caught:
        precompute.precompute(config(mixed, tmp_path / "out", clip=ClipConfig(frames=5)))
    assert caught.value.where == "clip.fps"
    (uri,) = precompute.precompute(config(mixed, tmp_path / "out", clip=ClipConfig(frames=5, fps=4.0)))
    assert manifest.read(uri).meta["samples"] == 3


def test_another_window_is_another_store_and_a_grown_set_reuses(made, tmp_path, in_process):
    precompute.precompute(config(made, tmp_path / "old"))
    for clip in (ClipConfig(frames=4, fps=4.0), ClipConfig(frames=5, fps=8.0)):
        with pytest.raises(AlreadyExists):
            precompute.precompute(config(made, tmp_path / "old", clip=clip))
        with pytest.raises(FingerprintMismatch, match="cannot be reused"):
            precompute.precompute(config(made, tmp_path / "x", clip=clip, reuse=str(tmp_path / "old")))
    grown = made | {"data": write_data(tmp_path / "grown", moving(0, N + 2), per_shard=2)}
    (anew,) = precompute.precompute(config(grown, tmp_path / "anew"))
    in_process.clear()
    (uri,) = precompute.precompute(config(grown, tmp_path / "new", reuse=str(tmp_path / "old")))
    assert [unit // 64 for part in in_process if not len(part.older) for unit in part.units.tolist()] == [5, 6]
    assert (manifest.read(uri).meta["encoded"], manifest.read(uri).meta["copied"]) == (2, N)
    assert digests(uri) == digests(anew)


def test_damaged_and_short_clips_are_left_out_counted_and_listed(made, tmp_path, in_process):
    good, short = moving(0, 4, "mp4"), moving(9, 1, "mp4", frames=6)[0]
    cut = dataclasses.replace(good[2], members=good[2].members | {"mp4": good[2].members["mp4"][:900]})
    no_video = dataclasses.replace(good[3], members=good[3].members | {"mp4": b"#EXTM3U\nhttp://example.invalid/x\n"})
    spoilt = made | {"data": write_data(tmp_path / "data", [good[0], short, cut, no_video], per_shard=3)}
    with pytest.raises(DataError, match="'000000009' cannot be used: 6 frames are too few") as caught:
        precompute.precompute(config(spoilt, tmp_path / "out"))
    assert "damage.policy=skip" in caught.value.mend
    skip = DamageConfig(policy="skip", max_bad_fraction=0.75)
    (uri,) = precompute.precompute(config(spoilt, tmp_path / "out", damage=skip, max_pixels=64 * 64))
    assert list(records(uri)) == ["000000000_0"]
    listed = [json.loads(line) for line in (Path(uri) / "rejected.jsonl").read_text().splitlines()]
    assert {one["key"]: one["reason"] for one in listed} == {
        "000000002": "unreadable", "000000003": "format", "000000009": "too_short",
    }  # fmt: skip


def test_a_window_that_no_clip_has_is_refused_before_anything_is_written(made, tmp_path, in_process):
    out, skip = tmp_path / "out", DamageConfig(policy="skip", max_bad_fraction=0.9)
    with pytest.raises(
        ConfigError, match="No clip is long enough for 400 frames at 8 per second.* of 12 frames"
    ) as caught:
        precompute.precompute(config(made, out, clip=ClipConfig(frames=400), damage=skip))
    assert caught.value.where == "clip.frames"
    assert not out.exists() and not in_process
    some = made | {"data": write_data(tmp_path / "some", [*moving(0, 2), *moving(2, 1, frames=24)], per_shard=3)}
    (uri,) = precompute.precompute(config(some, out, clip=ClipConfig(frames=24), damage=skip))
    assert list(records(uri)) == ["000000002_0"]


def test_frames_above_the_limit_are_rejected(made, tmp_path, in_process):
    with pytest.raises(DataError, match="64 x 64 pixels; max_pixels is 4000"):
        precompute.precompute(config(made, tmp_path / "out", max_pixels=4000))


def test_an_estimate_is_of_whole_clips(made, tmp_path, in_process, capsys):
    precompute.precompute(config(made, tmp_path / "out", estimate=True))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (uri,) = precompute.precompute(config(made, tmp_path / "out"))
    stored = sum(entry.size for name, entry in manifest.read(uri).files.items() if name.endswith(".tar"))
    assert found["records"] == N and found["bytes"] == pytest.approx(stored, rel=0.3)


def test_what_settings_and_data_do_not_agree_on_is_refused(made, tmp_path, in_process):
    with pytest.raises(ConfigError, match="clips of 12 frames") as caught:
        precompute.precompute(config(made, tmp_path / "out", clip=ClipConfig()))
    assert caught.value.where == "clip.frames"
    episodes = list(synthetic_episodes.episodes(2, seed=0))
    with pytest.raises(DataError, match="holds episodes") as caught:
        precompute.precompute(
            config(made | {"data": write_data(tmp_path / "e", episodes, per_shard=3)}, tmp_path / "out")
        )
    assert "pictures or clips" in caught.value.mend
    data = moving(0, 1)[0].members["json"]
    picture = shards.Sample(
        key="p", members={"png": data}, columns={"width": 64, "height": 64, "sha256": hashlib.sha256(data).digest()}
    )
    with pytest.raises(ConfigError, match="pictures, not clips"):
        precompute.precompute(
            config(made | {"data": write_data(tmp_path / "p", [picture], per_shard=3)}, tmp_path / "out")
        )
    mixed = Path(write_data(tmp_path / "mixed", moving(0, 2), per_shard=3))
    (mixed / "train").rename(mixed / "validation")
    for name in ("built", "train"):
        shutil.rmtree(mixed / name, ignore_errors=True)
    write_data(mixed, list(synthetic_episodes.episodes(2, seed=0)), per_shard=3)
    with pytest.raises(DataError, match="One split holds episodes, the other clips"):
        precompute.precompute(config(made | {"data": str(mixed)}, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("override", "where"), [("clip.frames=0", "clip.frames"), ("clip.fps=0", "clip.fps")])
def test_settings_that_mean_nothing_are_refused(override, where):
    with pytest.raises(ConfigError) as caught:
        compose.load(
            "precompute_latents",
            PrecomputeLatents,
            ["data=d", "autoencoder_from=a", "out=o", "text_encoder.source=t", override],
        )
    assert caught.value.where == where
