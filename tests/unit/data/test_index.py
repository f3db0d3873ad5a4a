"""The index: what was written is found by position, mapped and not copied, and in canonical order."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from latentray.data import index
from latentray.errors import ArtifactError


def result(name: str, count: int, uri: str = "", **columns) -> index.ShardResult:
    rows = [
        {"key": f"{name}-{i}", "offset": 1024 * i, "length": 512 + i, "crc32c": 2**32 - 1 - i}
        | {key: value(i) for key, value in columns.items()}
        for i in range(count)
    ]
    return index.ShardResult.of(
        index.ShardEntry(name=name, sha256="0" * 64, bytes=1024 * count, count=count, uri=uri), rows
    )


def test_samples_are_found_by_position_in_canonical_order(tmp_path):
    index.write([result("b.tar", 3), result("a.tar", 2), result("c.tar", 0)], tmp_path / index.NAME)
    opened = index.Index(tmp_path / index.NAME)
    assert opened.count == 5
    assert [entry.name for entry in opened.shards] == ["a.tar", "b.tar", "c.tar"]
    assert [opened.rows_of(shard) for shard in range(3)] == [range(2), range(2, 5), range(5, 5)]
    wanted = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert [opened.locate(x) for x in range(5)] == [
        index.Range(shard, 1024 * i, 512 + i, 2**32 - 1 - i) for shard, i in wanted
    ]
    assert list(opened.locate_all([4, 0, 4])) == [opened.locate(4), opened.locate(0), opened.locate(4)]


def test_columns_are_views_of_the_mapped_file(tmp_path):
    index.write([result("a.tar", 1000, width=lambda i: i), result("b.tar", 1000, width=lambda i: -i)], tmp_path / "i")
    before = pa.total_allocated_bytes()
    opened = index.Index(tmp_path / "i")
    width = opened.numbers("width")
    assert pa.total_allocated_bytes() - before < 4096
    assert width.dtype == np.int32
    assert not width.flags.owndata
    assert width[1005] == -5


def test_shards_elsewhere_keep_their_place(tmp_path):
    index.write([result("a.tar", 1, uri="s3://bucket/far/a.tar"), result("b.tar", 1)], tmp_path / "i")
    far, near = index.Index(tmp_path / "i").shards
    assert index.shard_uri("/data/set", far) == "s3://bucket/far/a.tar"
    assert index.shard_uri("/data/set", near) == "/data/set/b.tar"


def test_rows_travel_as_bytes_and_the_index_as_its_path(tmp_path):
    one = result("a.tar", 4, width=lambda i: i, score=lambda i: None if i else 0.5)
    again = index.ShardResult.from_bytes(one.to_bytes())
    assert (again.entry, again.table) == (one.entry, one.table)
    index.write([one], tmp_path / "i")
    opened = pickle.loads(pickle.dumps(index.Index(tmp_path / "i")))
    assert opened.table["score"].to_pylist() == [0.5, None, None, None]


def test_a_column_may_be_empty_in_one_shard(tmp_path):
    index.write([result("a.tar", 2, score=lambda i: None), result("b.tar", 2, score=float)], tmp_path / "i")
    assert index.Index(tmp_path / "i").table["score"].to_pylist() == [None, None, 0.0, 1.0]


def test_another_version_is_refused(tmp_path):
    table = pa.table({"key": ["a"]}).replace_schema_metadata({b"latentray.index_version": b"1"})
    with pa.ipc.new_file(tmp_path / "i", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ArtifactError, match="version 1"):
        index.Index(tmp_path / "i")
