"""Ranges of whole data sets: measured once, exact, kept beside the data, and never another data set's."""

import json
import shutil

import numpy as np
import pytest

from latentray.checkpoint import manifest
from latentray.data import episode_ranges, episodes, index, shards
from latentray.errors import DataError


def publish(root, values, width=1):
    """A data set of one-step episodes, each of one of these values."""
    folder = root / "built"
    folder.mkdir(parents=True)
    made = [
        episodes.episode_sample(
            f"{i:05d}", np.full((2, width), v, np.float32), {"state": np.full((2, 3), -v, np.float32)}
        )
        for i, v in enumerate(values)
    ]
    index.write([shards.write_shard(made, folder / shards.shard_name(0))], folder / index.NAME)
    manifest.publish(folder, root / "set" / "train", kind="dataset")
    shutil.rmtree(folder)
    return shards.IndexedShards.open(root / "set" / "train")


def extremes(found, name):
    return found[name].low.tolist(), found[name].high.tolist()


def test_they_are_the_extremes_of_all_episodes_of_all_sets(tmp_path):
    one, other = publish(tmp_path / "a", [0.5, -2.0, 1.0]), publish(tmp_path / "b", [4.0])
    assert extremes(episode_ranges.of_sets([one]), "actions") == ([-2.0], [1.0])
    both = episode_ranges.of_sets([one, other])
    assert extremes(both, "actions") == ([-2.0], [4.0])
    assert extremes(both, "obs.state") == ([-4.0] * 3, [2.0] * 3)


def test_they_are_measured_once_and_kept_beside_the_data(tmp_path, monkeypatch):
    opened = publish(tmp_path, [0.1, 0.7])
    first = episode_ranges.of_sets([opened])
    monkeypatch.setattr(episodes, "ranges", lambda found: pytest.fail("measured again"))
    again = episode_ranges.of_sets([shards.IndexedShards.open(opened.uri)])
    assert all(np.array_equal(again[name].low, one.low) for name, one in first.items())
    assert all(np.array_equal(again[name].high, one.high) for name, one in first.items())


def test_those_of_other_data_are_not_taken(tmp_path):
    opened = publish(tmp_path, [0.25, 0.75])
    kept = tmp_path / "set" / episode_ranges.NAME
    episode_ranges.of_sets([opened])
    stale = json.loads(kept.read_text())
    stale["digest"], stale["ranges"]["actions"]["low"] = "0" * 64, [-9.0]
    kept.write_text(json.dumps(stale))
    assert extremes(episode_ranges.of_sets([opened]), "actions") == ([0.25], [0.75])
    assert json.loads(kept.read_text())["digest"] == opened.digest


def test_a_data_set_that_cannot_be_written_beside_is_measured_all_the_same(tmp_path, monkeypatch):
    opened = publish(tmp_path, [0.5, 1.5])

    def full(uri, value):
        raise OSError("read-only file system")

    monkeypatch.setattr(episode_ranges.store, "write_json", full)
    assert extremes(episode_ranges.of_sets([opened]), "actions") == ([0.5], [1.5])


def test_a_damaged_episode_is_named_or_passed_over(tmp_path):
    opened = publish(tmp_path, [1.0, 5.0, 2.0])
    entry, offset, length = opened.locate(1)
    tar = tmp_path / "set" / "train" / entry.name
    data = bytearray(tar.read_bytes())
    place = data.index(np.full(2, 5.0, np.float32).tobytes(), offset, offset + length)
    data[place] ^= 1
    tar.write_bytes(bytes(data))
    reopened = shards.IndexedShards.open(opened.uri)
    with pytest.raises(DataError, match="'00001'") as caught:
        episode_ranges.of_sets([reopened])
    assert "damage.policy=skip" in caught.value.mend
    assert extremes(episode_ranges.of_sets([reopened], skip_damaged=True), "actions") == ([1.0], [2.0])


def test_data_sets_of_different_robots_are_refused(tmp_path):
    with pytest.raises(DataError, match="not those of the first"):
        episode_ranges.of_sets([publish(tmp_path / "a", [1.0]), publish(tmp_path / "b", [1.0], width=2)])
