"""Looking at clips, episodes and latents: the figures are those of the arrays that were written."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentray.checkpoint import manifest
from latentray.config.inspect_shards import InspectShards
from latentray.config.precompute_latents import ClipConfig, LatentBucketsConfig, PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import clips, episodes, index, inspection, inspection_kinds, kinds, latents, precompute, shards
from latentray.evaluation import data_sets
from latentray.records import LATENT_MEMBER

SIDE = 64


def write_data(root: Path, samples: list[shards.Sample]) -> str:
    folder = root / "built"
    folder.mkdir(parents=True)
    half = len(samples) // 2
    made = [
        shards.write_shard(some, folder / shards.shard_name(k))
        for k, some in enumerate((samples[:half], samples[half:]))
    ]
    index.write(made, folder / index.NAME)
    manifest.publish(folder, str(root / "train"), kind="dataset")
    return str(root)


def inspect(data: str, out: Path) -> dict:
    (found,) = data_sets.inspect(InspectShards(data=data, out=str(out)))
    assert json.loads((out / "train.json").read_text()) == json.loads(json.dumps(found))
    return found


def shade(number: int, frame: int) -> tuple[int, int, int]:
    return (40 * number, 20 * frame, 100)


def clip(number: int, frames: int, fps: float, form: str = "frames") -> shards.Sample:
    """Each frame is of one colour, that says its number."""
    pixels = np.array([shade(number, frame) for frame in range(frames)], np.uint8)[:, None, None]
    pixels = np.broadcast_to(pixels, (frames, 48, SIDE, 3))
    return clips.clip_sample(f"c{number}", pixels, fps, [f"clip number {number}"], form=form)


def test_clips_are_told_by_frames_rate_and_size_and_shown_by_their_middle(tmp_path, capsys):
    made = [clip(0, 4, 8.0), clip(1, 9, 8.0, "mp4"), clip(2, 6, 12.0)]
    bad = dataclasses.replace(clip(3, 5, 8.0), members={"mp4": b"nothing", "json": b"{}"})
    found = inspect(write_data(tmp_path / "data", [*made, bad]), tmp_path / "out")
    assert (found["kind"], found["samples"], found["checked"]) == ("clips", 4, 4)
    assert found["frames"] == {"min": 4, "median": 5.5, "max": 9}
    assert found["fps"] == {"min": 8, "median": 8, "max": 12}
    assert found["seconds"] == {"min": 0.5, "median": 0.5, "max": 9 / 8}
    assert found["width"]["median"] == SIDE and found["height"]["median"] == 48
    assert found["captions"]["distinct_share"] == 1
    assert [one["key"] for one in found["bad"]] == ["c3"]
    sheet = np.asarray(Image.open(tmp_path / "out" / "train.png")).astype(int)
    for number, middle in ((0, 2), (1, 4), (2, 3)):
        near = np.abs(sheet - np.array(shade(number, middle))).max(axis=2) <= 6
        assert near.sum() == pytest.approx(48 * SIDE, rel=0.1), number
    text = capsys.readouterr().out
    assert "4 clips" in text and "4 to 9, median 5.5" in text


def test_long_clips_are_decoded_a_stretch_at_a_time(monkeypatch):
    pixels = np.arange(150, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    taken = []
    take = clips.StoredFrames.take
    monkeypatch.setattr(clips.StoredFrames, "take", lambda self, at: taken.append(len(at)) or take(self, at))
    decoded = {"__key__": "x", "json": {"fps": 5}, clips.FRAMES_MEMBER: {"frames": torch.from_numpy(pixels)}}
    seen = inspection_kinds.clip(decoded)
    assert taken == [64, 64, 22] and (seen.picture == 75).all() and seen.facts["frames"] == 150


def episode(number: int, steps: int, pictures: bool) -> shards.Sample:
    random = np.random.default_rng(number)
    obs = {"state": random.normal(size=(steps, 3)).astype(np.float32)}
    if pictures:
        obs["camera"] = np.full((steps, 16, 16, 3), 60 * number, np.uint8)
    return episodes.episode_sample(f"e{number}", random.normal(size=(steps, 2)).astype(np.float32), obs, {"side": 1})


@pytest.mark.parametrize("pictures", [False, True])
def test_episodes_are_told_by_steps_shapes_and_ranges(tmp_path, capsys, pictures):
    made = [episode(number, steps, pictures) for number, steps in enumerate((5, 12, 7))]
    data = write_data(tmp_path / "data", made)
    found = inspect(data, tmp_path / "out")
    assert (found["kind"], found["bad"], found["steps"]) == ("episodes", [], {"min": 5, "median": 7, "max": 12})
    opened = shards.IndexedShards.open(f"{data}/train")
    read = [episodes.read_episode(inspection.members.decode_sample(opened.read(x))) for x in range(3)]
    actions = np.concatenate([one.actions_TA for one in read])
    held = found["held"]
    assert held["actions"] == {
        "shapes": {"float32 (T, 2)": 3}, "low": actions.min(axis=0).tolist(), "high": actions.max(axis=0).tolist(),
    }  # fmt: skip
    assert held["obs.state"]["shapes"] == {"float32 (T, 3)": 3} and len(held["obs.state"]["low"]) == 3
    assert ("obs.camera" in held) == pictures == (tmp_path / "out" / "train.png").exists()
    assert "captions" not in found
    if pictures:
        assert held["obs.camera"] == {"shapes": {"uint8 (T, 16, 16, 3)": 3}}
    text = capsys.readouterr().out
    assert "3 episodes" in text and "actions: least" in text


def noise(number: int, height: int, width: int) -> shards.Sample:
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    size = {"width": width, "height": height}
    return shards.Sample(
        key=f"p{number}", members={"png": buffer.getvalue(), "txt": f"picture {number}".encode()}, columns=size
    )


@pytest.fixture
def encoded(tiny, tmp_path):
    return {
        "autoencoder_from": tiny.write_autoencoder(str(tmp_path / "autoencoder"), scale=4.0),
        "text_encoder": TextEncoderConfig(source=tiny.write_text_encoder(str(tmp_path / "text"))),
        "out": str(tmp_path / "latents"),
        "device": "cpu",
        "batch_size": 4,
    }


def test_latents_are_told_by_shape_and_by_mean_and_deviation_of_each_channel(tmp_path, encoded, in_process, capsys):
    shapes = [(64, 64), (64, 96), (96, 64), (64, 64), (64, 96)]
    data = write_data(tmp_path / "data", [noise(i, *shape) for i, shape in enumerate(shapes)])
    buckets = LatentBucketsConfig(sizes=[64], step=16, max_aspect=2.0)
    (uri,) = precompute.precompute(PrecomputeLatents(data=data, buckets=buckets, flip_variants=True, **encoded))
    found = inspect(encoded["out"], tmp_path / "out")
    assert (found["kind"], found["samples"], found["bad"]) == ("latents", 10, [])
    assert found["buckets"] == {"64 x 64": 4, "48 x 80": 4, "80 x 48": 2}
    assert found["latent_shapes"] == {"4 x 10 x 6": 2, "4 x 6 x 10": 4, "4 x 8 x 8": 4}
    assert found["text_encoders"] == ["clip"] and found["variants"] == [0, 1]
    assert found["autoencoder"] == encoded["autoencoder_from"]
    opened = shards.IndexedShards.open(uri, kind="latents")
    records = [inspection.members.decode_sample(opened.read(x))[LATENT_MEMBER] for x in range(10)]
    mean = torch.cat([one["mean"].double().flatten(1) for one in records], dim=1)
    variance = torch.cat([one["logvar"].double().exp().flatten(1) for one in records], dim=1)
    np.testing.assert_allclose(found["latent_mean"], mean.mean(dim=1), atol=1e-9)
    np.testing.assert_allclose(found["latent_std"], mean.std(dim=1, correction=0), rtol=1e-6)
    np.testing.assert_allclose(found["posterior_std"], variance.mean(dim=1).sqrt(), rtol=1e-6)
    assert found["captions"]["distinct_share"] == 0.5
    text = capsys.readouterr().out
    assert "10 latents" in text and "mean 0.1, std 0.25" in text


def test_latents_of_clips_say_frames_and_rate_and_damage_is_named(tmp_path, encoded, in_process):
    data = write_data(tmp_path / "data", [clip(number, 6, 8.0) for number in range(3)])
    (uri,) = precompute.precompute(PrecomputeLatents(data=data, clip=ClipConfig(frames=4), **encoded))
    opened = shards.IndexedShards.open(uri, kind="latents")
    entry, offset, length = opened.locate(1)
    path = Path(uri) / entry.name
    spoilt = bytearray(path.read_bytes())
    spoilt[offset + length // 2] ^= 1
    path.write_bytes(spoilt)
    found = inspect(encoded["out"], tmp_path / "out")
    assert (found["frames"], found["fps"], found["latent_shapes"]) == (4, 8.0, {"4 x 4 x 8 x 8": 2})
    assert [one["key"] for one in found["bad"]] == ["c1_0"]


def test_a_latent_that_is_no_number_is_bad():
    record = latents.record(torch.full((4, 2, 2), torch.nan), torch.zeros(4, 2, 2), {})
    with pytest.raises(inspection_kinds.DataError, match="not finite"):
        inspection_kinds.latent(inspection.members.decode_sample({"__key__": "x", **record}))
    with pytest.raises(inspection_kinds.DataError, match="no latent"):
        inspection_kinds.latent({"__key__": "x"})


def test_the_kind_is_known_without_columns_and_past_damage(tmp_path):
    for name, one in (
        (kinds.CLIPS, clip(0, 3, 8.0)), (kinds.EPISODES, episode(0, 4, False)), (kinds.PICTURES, noise(0, 8, 8)),
    ):  # fmt: skip
        bare = [dataclasses.replace(one, key=f"k{i}", columns={}) for i in range(4)]
        data = write_data(tmp_path / name, bare)
        path = Path(data) / "train" / "00000.tar"
        path.write_bytes(path.read_bytes()[:700])
        assert kinds.kind_of(shards.IndexedShards.open(f"{data}/train")) == name
