"""Who is missed, by whom and after how long: signs of life as records, and worlds of real processes that are stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentray.training import policies, watchdog
from latentray.training.policies import Beat, Hang
from latentray.training.watchdog import EXIT_CODE, Heard

SCRIPT = Path(__file__).with_name("watched.py")
KILLED = -9

SCENARIOS: dict[str, dict] = {
    "calm": {"world": 2, "fates": {}},
    "one stopped": {"world": 3, "fates": {"1": "stop"}},
    "rank 0 stopped": {"world": 3, "fates": {"0": "stop"}},
    "rank 0 killed": {"world": 2, "fates": {"0": "kill"}},
    "one stands": {"world": 3, "fates": {"2": "stand"}},
    "all paused": {"world": 2, "fates": {"0": "pause 9", "1": "pause 9"}},
    "one done early": {"world": 2, "fates": {"1": "end"}},
}


def heard(rank: int, at: float, **changes) -> Heard:
    about = dict(host="a", pid=100 + rank, step=7, in_step_s=1.0, watched=True, count=3) | changes
    return Heard(json.dumps(about), at)


def test_silence_is_counted_to_the_last_answer_of_the_store_and_that_of_rank_0_to_now():
    found = watchdog.beats({0: heard(0, 20.0), 1: heard(1, 19.0), 2: heard(2, 4.0)}, answered=21.0, now=30.0)
    assert {rank: one.silent_s for rank, one in found.items()} == {0: 10.0, 1: 2.0, 2: 17.0}
    assert found[1] == Beat(rank=1, host="a", pid=101, step=7, in_step_s=1.0, silent_s=2.0, watched=True)


def test_a_rank_that_is_done_is_not_missed():
    found = watchdog.beats({0: heard(0, 1.0), 1: Heard(json.dumps({"over": True}), 1.0)}, answered=90.0, now=90.0)
    assert list(found) == [0]


def test_a_verdict_travels_as_it_is():
    beat = Beat(rank=3, host="b", pid=5, step=9, in_step_s=2.0, silent_s=16.5, watched=False)
    for silent in (True, False):
        found = Hang(beat=beat, silent=silent)
        assert watchdog._from_json(watchdog._to_json(found)) == found


def test_what_only_waits_is_not_silent():
    waiting = Beat(rank=0, host="a", pid=1, step=3, in_step_s=1e4, silent_s=0.5, watched=True)
    assert policies.silent({0: waiting}, policies.FaultsConfig()) is None


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, dict[str, dict[str, int | None]]]:
    """All scenarios at the same time; their folder, and the exit codes by scenario and rank."""
    root = tmp_path_factory.mktemp("watched")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(root), json.dumps(SCENARIOS)],
        env=os.environ, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return root, json.loads(done.stdout.splitlines()[-1])


def output(ended, name: str, rank: int) -> str:
    return (ended[0] / name / f"{rank}.log").read_text()


def stacks(ended, name: str) -> list[str]:
    return sorted(path.name for path in (ended[0] / name / "stacks").glob("*"))


@pytest.mark.slow
def test_ranks_that_live_end_as_they_like(ended):
    assert ended[1]["calm"] == {"0": 0, "1": 0}
    assert not stacks(ended, "calm")


@pytest.mark.slow
def test_a_stopped_rank_is_named_by_all_others_and_ended(ended):
    assert ended[1]["one stopped"] == {"0": EXIT_CODE, "1": KILLED, "2": EXIT_CODE}
    for rank in (0, 2):
        assert "hang: rank 1 (process " in output(ended, "one stopped", rank)
        assert "gave no sign of life for 5 s" in output(ended, "one stopped", rank)
    assert stacks(ended, "one stopped") == ["one-rank_00000.txt", "one-rank_00002.txt"]
    assert "rank_of" in (ended[0] / "one stopped" / "stacks" / "one-rank_00002.txt").read_text(), "where it stood"


@pytest.mark.slow
def test_rank_0_is_missed_though_its_store_never_answers(ended):
    assert ended[1]["rank 0 stopped"] == {"0": KILLED, "1": EXIT_CODE, "2": EXIT_CODE}
    assert all("hang: rank 0 (process " in output(ended, "rank 0 stopped", rank) for rank in (1, 2))
    assert len(stacks(ended, "rank 0 stopped")) == 2


@pytest.mark.slow
def test_rank_0_is_missed_when_it_is_gone_and_its_store_with_it(ended):
    assert ended[1]["rank 0 killed"] == {"0": KILLED, "1": EXIT_CODE}
    assert "hang: rank 0 (process " in output(ended, "rank 0 killed", 1)


@pytest.mark.slow
def test_a_step_that_does_not_end_is_named_by_all_and_its_rank_ends_itself(ended):
    assert ended[1]["one stands"] == {"0": EXIT_CODE, "1": EXIT_CODE, "2": EXIT_CODE}
    for rank in range(3):
        assert "hang: rank 2 (process " in output(ended, "one stands", rank)
        assert "has been there for" in output(ended, "one stands", rank)
    assert len(stacks(ended, "one stands")) == 3


@pytest.mark.slow
def test_a_pause_of_the_whole_machine_is_nobodys_silence(ended):
    assert ended[1]["all paused"] == {"0": 0, "1": 0}
    assert not stacks(ended, "all paused")


@pytest.mark.slow
def test_a_rank_that_ended_is_not_missed(ended):
    assert ended[1]["one done early"] == {"0": 0, "1": 0}
