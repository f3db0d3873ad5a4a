"""Captions joined by key: sorted once, found by bisection, whatever the table's order."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.config.build_shards import SourceConfig
from latentray.data import captions
from latentray.errors import ConfigError, DataError, InputMissing


def opened(tmp_path, rows, **columns) -> captions.Captions:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SourceConfig(name="webdataset", path="x", captions=str(tmp_path / "t.jsonl"), **columns)
    return captions.Captions.open(captions.sort(config, str(tmp_path / "sorted.arrow")))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["a", "b", "", "é", "z z", "a.b", "𝒳", "\uffff"]), st.text("xy ", max_size=3))
    )
)
def test_each_key_has_its_captions_in_the_tables_order(tmp_path_factory, rows):
    rows = [*rows, ("last", "x")]
    found = opened(tmp_path_factory.mktemp("c"), [{"key": key, "caption": text} for key, text in rows])
    for key in {key for key, _ in rows} | {"none"}:
        assert found.of(key) == [text.strip() for other, text in rows if other == key and text.strip()]


def test_lists_of_captions_and_other_columns(tmp_path):
    rows = [
        {"sha256": "ff", "text": ["one", " ", "two"]},
        {"sha256": 7, "text": "seven"},
        {"sha256": None, "text": "x"},
    ]
    found = opened(tmp_path, rows, join="sha256", caption_column="text")
    assert (found.of("ff"), found.of("7"), found.of("None")) == (["one", "two"], ["seven"], [])


def test_tables_that_cannot_be_joined_are_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, [{"name": "a", "caption": "b"}])
    assert caught.value.where == "source.join"
    with pytest.raises(DataError, match="no captions"):
        opened(tmp_path, [{"key": "a", "caption": ""}])
    with pytest.raises(InputMissing):
        captions.sort(SourceConfig(name="webdataset", path="x", captions=str(tmp_path / "no.csv")), str(tmp_path / "o"))
