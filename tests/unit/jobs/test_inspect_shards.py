"""`python -m jobs.inspect_shards`: the figures of a made data set, a contact sheet, and damage found by name."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from latentray.checkpoint import manifest
from latentray.config import command, compose
from latentray.config.inspect_shards import InspectShards
from latentray.data import index, inspection, shards
from latentray.evaluation import data_sets

SIZES = [(64, 64), (96, 64), (64, 96), (64, 64), (160, 64), (64, 64)]


def png(width: int, height: int, shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (shade, 30, 200 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "built"
    folder.mkdir()

    def sample(i: int) -> shards.Sample:
        width, height = SIZES[i]
        about = json.dumps({"captions": ["one", "two words"] if i == 0 else [f"caption {i % 2}"]}).encode()
        members = {"png": png(width, height, 40 * i), "txt": b"x", "json": about}
        digest = bytes([3 if i == 5 else i] * 32)
        return shards.Sample(
            key=f"{i:03d}", members=members, columns={"width": width, "height": height, "sha256": digest}
        )

    made = [
        shards.write_shard(map(sample, part), folder / shards.shard_name(k))
        for k, part in enumerate((range(4), (4, 5)))
    ]
    index.write(made, folder / index.NAME)
    manifest.publish(folder, str(tmp_path / "data" / "train"), kind="dataset")
    return tmp_path / "data"


def run(data, tmp_path, *more: str) -> dict:
    (found,) = data_sets.inspect(
        compose.load("inspect_shards", InspectShards, [f"data={data}", f"out={tmp_path}/i", *more])
    )
    return found


def test_the_figures_are_those_of_the_data(data, tmp_path):
    found = run(data, tmp_path)
    assert (found["samples"], found["shards"], found["checked"], found["bad"]) == (6, 2, 6, [])
    assert found["width"] == {"min": 64, "median": 64, "max": 160}
    assert {k: n for k, n in found["aspects"].items() if n} == {"0.5-0.67": 1, "0.95-1.05": 3, "1.5-2": 1, ">2": 1}
    assert found["exact_duplicates"] == 1
    assert found["captions"]["per_sample"] == {"min": 1, "median": 1, "max": 2}
    assert found["captions"]["distinct_share"] == pytest.approx(4 / 7)
    assert found["samples_per_shard"] == {"min": 2, "median": 3, "max": 4}
    assert json.loads((tmp_path / "i" / "train.json").read_text()) == found


def test_every_picture_stands_whole_on_the_sheet(data, tmp_path):
    run(data, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "i" / "train.png"))
    for i, (width, height) in enumerate(SIZES):
        wanted = np.array([40 * i, 30, 200 - 40 * i])
        seen = (np.abs(sheet.astype(int) - wanted).max(axis=2) <= 2).sum()
        scale = min(128 / max(width, height), 1)
        assert seen == pytest.approx(width * height * scale**2, rel=0.1)


def test_a_flipped_bit_and_a_cut_shard_are_findings(data, tmp_path):
    path = data / "train" / "00000.tar"
    bytes_ = bytearray(path.read_bytes())
    bytes_[600] ^= 1
    path.write_bytes(bytes(bytes_))
    second = data / "train" / "00001.tar"
    second.write_bytes(second.read_bytes()[:700])
    found = run(data, tmp_path)
    assert [one["key"] for one in found["bad"]] == ["000", "004", "005"]
    assert {one["shard"] for one in found["bad"]} == {"00000.tar", "00001.tar"}
    assert (tmp_path / "i" / "train.png").exists()


def test_a_check_of_some_is_spread_over_all():
    assert inspection.spread(10, 0) == list(range(10))
    for place, x in enumerate(inspection.spread(1000, 37)):
        assert place * 1000 // 37 <= x < (place + 1) * 1000 // 37
    assert len({x % 51 for x in inspection.spread(10200, 40)}) > 20  # kinds that take turns are all met
    assert inspection.spread(3, 9) == [0, 1, 2]


def test_what_is_no_data_set_is_refused(tmp_path, capsys):
    code = command.run("inspect_shards", InspectShards, data_sets.inspect, [f"data={tmp_path}", f"out={tmp_path}/i"])
    assert code == 2 and "build_shards" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
