"""Folders and tables as sources: what is found, and what is refused with its reason."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentray.config.build_shards import SourceConfig
from latentray.data import sources
from latentray.errors import ConfigError, DataError, InputMissing, SampleRejected, UnsafeMember


def folder(path) -> list:
    return sources.entries(SourceConfig(name="folder", path=str(path)))


def table(path, **columns) -> list:
    return sources.entries(SourceConfig(name="table", path=str(path), **columns))


def reason_of(entry) -> str:
    with pytest.raises(SampleRejected) as caught:
        sources.read(entry)
    return caught.value.reason


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "sub.x").mkdir()
    for name in ("b.PNG", "a.v2.jpg", "sub.x/c.webp", "alone.jpeg"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b.txt").write_text("one\n\n  two \n")
    (tmp_path / "a.v2.txt").write_text("\ufeffwith a mark", encoding="utf-8")
    (tmp_path / "sub.x/c.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def test_a_folder_is_read_recursively_with_captions_beside(pictures):
    found = {entry["name"]: entry for entry in folder(pictures)}
    assert list(found) == ["a.v2.jpg", "alone.jpeg", "b.PNG", "sub.x/c.webp"]
    assert sources.read(found["b.PNG"]) == (b"b.PNG", ["one", "two"])
    assert sources.read(found["a.v2.jpg"])[1] == ["with a mark"]
    assert reason_of(found["alone.jpeg"]) == "missing_caption"
    assert reason_of(found["sub.x/c.webp"]) == "unreadable_caption"
    json.dumps(list(found.values()))


def test_an_empty_caption_is_a_missing_one(pictures):
    (pictures / "b.txt").write_text(" \n\n")
    assert reason_of(next(e for e in folder(pictures) if e["name"] == "b.PNG")) == "missing_caption"


def write_csv(path, rows):
    path.write_text("path,caption\n" + "".join(f'{p},"{c}"\n' for p, c in rows))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps({"path": p, "caption": c}) + "\n" for p, c in rows))


def write_parquet(path, rows):
    pq.write_table(
        pa.table({"path": [p for p, _ in rows], "caption": [c for _, c in rows], "x": [0] * len(rows)}), path
    )


@pytest.mark.parametrize(
    ("name", "write"), [("t.csv", write_csv), ("t.jsonl", write_jsonl), ("t.parquet", write_parquet)]
)
def test_a_table_of_relative_and_absolute_paths(pictures, name, write):
    rows = [("b.PNG", "a, b"), (str(pictures / "a.v2.jpg"), "7"), ("gone.png", "c"), ("b.PNG", ""), ("", "d")]
    write(pictures / name, rows)
    found = table(pictures / name)
    assert sources.read(found[0]) == (b"b.PNG", ["a, b"])
    assert sources.read(found[1]) == (b"a.v2.jpg", ["7"])
    assert [reason_of(entry) for entry in found[2:]] == ["missing_file", "missing_caption", "missing_file"]


def test_a_list_of_captions_and_other_columns(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"url": "s3://b/x.png", "text": ["a", " ", "b"]}\n')
    (entry,) = table(tmp_path / "t.jsonl", path_column="url", caption_column="text")
    assert entry == {"name": "s3://b/x.png", "uri": "s3://b/x.png", "captions": ["a", "b"], "caption_uri": None}


def test_wrong_inputs_are_refused(tmp_path, pictures):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("no picture")
    with pytest.raises(InputMissing, match="not there"):
        folder(tmp_path / "nope")
    with pytest.raises(InputMissing, match="no pictures"):
        folder(empty)
    with pytest.raises(InputMissing, match="a file"):
        folder(pictures / "b.PNG")
    with pytest.raises(InputMissing, match="a folder"):
        table(pictures)
    (pictures / "t.xlsx").write_text("")
    with pytest.raises(ConfigError, match="xlsx"):
        table(pictures / "t.xlsx")
    write_csv(pictures / "t.csv", [("b.PNG", "x")])
    with pytest.raises(ConfigError) as caught:
        table(pictures / "t.csv", caption_column="text")
    assert caught.value.where == "source.caption_column"
    assert "path, caption" in caught.value.mend
    write_csv(pictures / "t.csv", [])
    with pytest.raises(InputMissing):
        table(pictures / "t.csv")
    write_csv(pictures / "t.csv", [("pipe:rm x", "x")])
    with pytest.raises(UnsafeMember):
        table(pictures / "t.csv")
    for name, data in (("t.jsonl", b"{"), ("t.jsonl", b"3\n"), ("t.parquet", b"junk"), ("t.csv", b"\xff\xff")):
        (pictures / name).write_bytes(data)
        with pytest.raises(DataError, match="cannot be read"):
            table(pictures / name)
