"""Class labels, from a folder of folders, a table or tars: kept, indexed, carried into latents."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentray.config.build_shards import BuildShards, SourceConfig
from latentray.data import latents, members, sample_facts, shard_building, shards
from latentray.errors import ConfigError, DataError
from latentray.records import SampleId


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Survey and pack in this process: the graphs' functions, without Ray."""

    def run(task, jobs, config, captions):
        for job in reversed(jobs):  # workers finish in any order
            row = shard_building._row({"job": json.dumps(job)}, task=task, config=config, captions=captions)
            if row["error"]:
                raise pickle.loads(row["error"])
            yield row

    monkeypatch.setattr(shard_building, "_run", run)


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def build(path: Path, out: Path, **source) -> shards.IndexedShards:
    config = BuildShards(
        source=SourceConfig(path=str(path), **source), out=str(out), validation_fraction=0.0, samples_per_shard=4
    )
    shard_building.build(config)
    return shards.IndexedShards.open(str(out / "train"))


def described(opened: shards.IndexedShards) -> dict[str, dict]:
    decoded = (members.decode_sample(opened.read(x)) for x in range(opened.count))
    return {one["json"]["source"]: one["json"] for one in decoded}


def labels_of(opened: shards.IndexedShards) -> list[int]:
    return opened.index.numbers("label").tolist()


def classes(root: Path) -> Path:
    for number, name in enumerate(["tench/a.png", "ape/x/b.png", "tench/c.png", "zebra/d.png", "ape/e.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    (root / "zebra" / "d.txt").write_text("a striped animal")
    return root


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    opened = build(classes(tmp_path / "in"), tmp_path / "out", name="folder", label="folder")
    found = described(opened)
    assert {name: one["label"] for name, one in found.items()} == {
        "tench/a.png": 1, "ape/x/b.png": 0, "tench/c.png": 1, "zebra/d.png": 2, "ape/e.png": 0,
    }  # fmt: skip
    by_row = [members.decode_sample(opened.read(x))["json"]["label"] for x in range(opened.count)]
    assert labels_of(opened) == by_row
    assert opened.manifest.meta["classes"] == ["ape", "tench", "zebra"]
    assert found["tench/a.png"]["captions"] == ["tench"] and found["zebra/d.png"]["captions"] == ["a striped animal"]


def test_a_picture_in_no_class_is_refused_before_the_job(tmp_path):
    (classes(tmp_path / "in") / "loose.png").write_bytes(picture(9))
    with pytest.raises(DataError, match="'loose.png' lies in no folder") as caught:
        build(tmp_path / "in", tmp_path / "out", name="folder", label="folder")
    assert "source.label" in caught.value.mend
    with pytest.raises(ConfigError, match="folders are classes"):
        SourceConfig(name="folder", path="p", label="class")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_gives_labels_in_a_column(tmp_path, suffix):
    rows = [{"path": f"{i}.png", "caption": f"picture {i}", "class": i % 3} for i in range(5)]
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    lines = [json.dumps(row) for row in rows]
    if suffix == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (tmp_path / f"table.{suffix}").write_text("\n".join(lines) + "\n")
    opened = build(tmp_path / f"table.{suffix}", tmp_path / "out", name="table", label="class")
    assert {name: one["label"] for name, one in described(opened).items()} == {f"{i}.png": i % 3 for i in range(5)}
    with pytest.raises(ConfigError) as caught:
        build(tmp_path / f"table.{suffix}", tmp_path / "other", name="table", label="klass")
    assert "source.label" in caught.value.where


def tar(path: Path, samples: list[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for number, sample in enumerate(samples):
            for extension, data in sample.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


SAMPLES = [
    {"png": picture(0), "cls": b"7\n"},
    {"png": picture(1), "txt": b"a caption", "json": b'{"label": 3}'},
    {"png": picture(2), "txt": b"no class"},
    {"png": picture(3), "txt": b"a name is no number", "json": b'{"label": "cat"}', "cls": b"2"},
    {"png": picture(4), "txt": b"nor is this", "json": b'{"label": -1}'},
]
LABELS = [7, 3, -1, 2, -1]


@pytest.mark.parametrize("index_only", [False, True])
def test_tars_give_labels_in_their_json_or_beside_it(tmp_path, index_only):
    tar(tmp_path / "in" / "a.tar", SAMPLES)
    opened = build(tmp_path / "in", tmp_path / "out", name="webdataset", index_only=index_only)
    assert labels_of(opened) == LABELS
    if not index_only:
        assert members.captions_of(members.decode_sample(opened.read(0))) == [""]


@pytest.mark.parametrize("index_only", [False, True])
def test_shards_without_labels_are_told_apart_from_a_data_set_without(tmp_path, index_only):
    plain = [{"png": picture(9 + i), "txt": b"no class"} for i in range(5)]
    tar(tmp_path / "none" / "a.tar", plain)
    opened = build(tmp_path / "none", tmp_path / "out", name="webdataset", index_only=index_only)
    assert "label" not in opened.columns
    tar(tmp_path / "both" / "a.tar", plain)
    tar(tmp_path / "both" / "b.tar", SAMPLES)
    opened = build(tmp_path / "both", tmp_path / "out_both", name="webdataset", index_only=index_only)
    assert labels_of(opened) == [-1] * 5 + LABELS
    facts = sample_facts.SampleFacts([opened])
    ids = [SampleId(epoch=0, dataset=0, index=x) for x in (6, 5, 0)]
    assert facts.labels(ids).tolist() == [3, 7, -1] and facts.sizes(ids) is None


def test_labels_that_do_not_fit_are_refused(tmp_path):
    tar(tmp_path / "in" / "a.tar", [SAMPLES[0], SAMPLES[1]])
    opened = build(tmp_path / "in", tmp_path / "out", name="webdataset")
    sample_facts.require_labels([opened], classes=8)
    with pytest.raises(ConfigError, match="label 7") as caught:
        sample_facts.require_labels([opened], classes=7)
    assert caught.value.where == "denoiser.classes" and "8" in caught.value.mend
    tar(tmp_path / "some" / "a.tar", SAMPLES)
    some = build(tmp_path / "some", tmp_path / "out_some", name="webdataset")
    with pytest.raises(DataError, match="2 of 5 samples have no class label"):
        sample_facts.require_labels([opened, some], classes=8)


def test_a_store_of_latents_says_its_labels_and_class_names(tiny, tmp_path, monkeypatch):
    build(classes(tmp_path / "in"), tmp_path / "data", name="folder", label="folder")
    written = tiny.write_latents(
        tmp_path, monkeypatch, data=str(tmp_path / "data"), autoencoder=tiny.write_autoencoder(str(tmp_path / "a")),
        flip_variants=True,
    )  # fmt: skip
    store = shards.IndexedShards.open(f"{written}/train", kind=latents.KIND)
    data = shards.IndexedShards.open(str(tmp_path / "data" / "train"))
    assert labels_of(store) == [label for label in labels_of(data) for _ in range(2)]
    assert latents.describe(store.uri).classes == ("ape", "tench", "zebra")
