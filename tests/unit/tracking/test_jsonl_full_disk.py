"""Metrics on a disk that is full for a while: the kernel takes a part of a line, then nothing, then all again."""

import json
import resource

import pytest

from latentray.tracking.jsonl import METRICS_FILE, JsonlTracker


@pytest.fixture
def limit():
    """limit(bytes): no file of this process may grow beyond; None takes it away. The kernel then refuses as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_to(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_to
    set_to(None)


def test_no_line_is_lost_torn_or_doubled_and_nothing_is_raised(tmp_path, limit, caplog):
    tracker = JsonlTracker(tmp_path)
    path = tmp_path / METRICS_FILE
    for step in range(1, 4):
        tracker.log(step, {"train/loss": 1 / step})
    limit(path.stat().st_size + 17)
    for step in range(4, 9):
        tracker.log(step, {"train/loss": 1 / step})
    assert len(path.read_bytes().splitlines()) == 4, "three lines, and 17 bytes of the fourth"
    assert [record.levelname for record in caplog.records] == ["WARNING"], "it is said once"
    limit(None)
    tracker.log(9, {"train/loss": 1 / 9})
    tracker.finish()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["samples"] for line in lines] == list(range(1, 10))
    assert [line["train/loss"] for line in lines] == [1 / step for step in range(1, 10)]


def test_what_is_left_at_the_end_is_tried_once_more(tmp_path, limit):
    tracker = JsonlTracker(tmp_path)
    tracker.log(1, {"train/loss": 1.0})
    limit((tmp_path / METRICS_FILE).stat().st_size)
    tracker.log(2, {"train/loss": 0.5})
    limit(None)
    tracker.finish()
    assert [json.loads(line)["samples"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [1, 2]


def test_a_run_that_ends_on_a_full_disk_leaves_lines_that_the_next_attempt_can_go_on_from(tmp_path, limit):
    tracker = JsonlTracker(tmp_path)
    tracker.log(1, {"train/loss": 1.0})
    limit((tmp_path / METRICS_FILE).stat().st_size + 5)
    tracker.log(2, {"train/loss": 0.5})
    tracker.finish()
    limit(None)
    again = JsonlTracker(tmp_path, resumed_at=1)
    again.log(2, {"train/loss": 0.5})
    again.finish()
    assert [json.loads(line)["samples"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [1, 2]
