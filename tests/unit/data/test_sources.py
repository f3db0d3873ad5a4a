"""Folders and tables as sources: what is found, and what is refused with its reason."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentray.config.build_shards import SourceConfig
from latentray.data import sources, tables
from latentray.data.parts import Part
from latentray.errors import ConfigError, DataError, InputMissing, SampleRejected, UnsafeMember


def entries(config: SourceConfig) -> list:
    return [entry for part in sources.parts(config) for entry in sources.entries(part, config)]


def folder(path) -> list:
    return entries(SourceConfig(name="folder", path=str(path)))


def table(path, **columns) -> list:
    return entries(SourceConfig(name="table", path=str(path), **columns))


def tars(path) -> list[tuple[str, str]]:
    return [(part.uri, part.name) for part in sources.parts(SourceConfig(name="webdataset", path=str(path)))]


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


TABLES = [("t.csv", write_csv), ("t.jsonl", write_jsonl), ("t.parquet", write_parquet)]


@pytest.mark.parametrize(("name", "write"), TABLES)
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
    assert (entry["name"], entry["uri"], entry["captions"]) == ("s3://b/x.png", "s3://b/x.png", ["a", "b"])


@pytest.mark.parametrize(("name", "write"), TABLES)
def test_parts_of_a_table_read_alone_what_the_whole_holds(tmp_path, monkeypatch, name, write):
    monkeypatch.setattr(tables, "PART_ROWS", 3)
    write(tmp_path / name, [(f"{i}.png", f"line one\nline {i}") for i in range(8)])
    config = SourceConfig(name="table", path=str(tmp_path / name))
    parts = sources.parts(config)
    assert [(part.first, part.count) for part in parts] == [(0, 3), (3, 3), (6, 2)]
    for part in reversed(parts):
        part = Part.of(json.loads(json.dumps(dataclasses.asdict(part))))
        (last,) = sources.entries(part, config, [part.count - 1])
        assert last["name"] == f"{part.first + part.count - 1}.png"
        assert last["captions"] == [f"line one\nline {part.first + part.count - 1}"]
        assert [e["name"] for e in sources.entries(part, config)] == [
            f"{part.first + i}.png" for i in range(part.count)
        ]


def test_columns_that_are_asked_for_come_as_numbers_where_they_are(tmp_path):
    (tmp_path / "t.csv").write_text("path,caption,score,tag\na.png,x,5.5,red\nb.png,y,,7\nc.png\n")
    config = SourceConfig(name="table", path=str(tmp_path / "t.csv"))
    (part,) = sources.parts(config)
    assert sources.columns(config, [part]) == ["path", "caption", "score", "tag"]
    about = [entry["about"] for entry in sources.entries(part, config, asked=["score", "tag"])]
    assert about == [{"score": 5.5, "tag": "red"}, {"score": "", "tag": 7}, {"score": None, "tag": None}]


def test_half_a_surrogate_pair_in_a_caption_does_not_survive(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"path": "a.png", "caption": "a \\ud83d b"}\n')
    assert table(tmp_path / "t.jsonl")[0]["captions"] == ["a ? b"]


def test_tars_are_a_folder_one_file_or_a_pattern(tmp_path):
    for name in ("b/1.tar", "b/0.tar", "c/2.tar", "c/2.json", "3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [name for _, name in tars(tmp_path)] == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert tars(tmp_path / "b/1.tar") == [(str(tmp_path / "b/1.tar"), "1.tar")]
    assert [name for _, name in tars(tmp_path / "?/[12].tar")] == ["1.tar", "2.tar"]
    assert [name for _, name in tars(tmp_path / "*.tar")] == ["3.tar"]
    (tmp_path / "c/0.tar").write_bytes(b"")
    assert [name for _, name in tars(tmp_path)] == ["3.tar", "b--0.tar", "b--1.tar", "c--0.tar", "c--2.tar"]
    for missing in ("nope", "nope.tar", "d/*.tar"):
        with pytest.raises(InputMissing):
            tars(tmp_path / missing)


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
