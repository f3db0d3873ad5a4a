"""The clock of a run: what counts, what was lost and to what, over attempts."""

import pytest

from latentray.training.clock import CHECKPOINTS, DATA, DROPPED, FAULTS, OTHER, Clock


def test_time_is_sorted_and_its_shares_make_up_one():
    clock = Clock.begin(now=1000.0)
    for _ in range(8):
        clock.step(seconds=10.0, data_s=1.0, applied=True)
    clock.step(seconds=10.0, data_s=1.0, applied=False)
    shares = clock.shares(now=1100.0)
    assert clock.goodput(now=1100.0) == pytest.approx(0.72)
    assert shares[DATA] == pytest.approx(0.09) and shares[DROPPED] == pytest.approx(0.09)
    assert shares[OTHER] == pytest.approx(0.10)
    assert clock.goodput(now=1100.0) + sum(shares.values()) == pytest.approx(1.0)


def test_a_fault_costs_the_steps_since_the_checkpoint_and_the_restart():
    clock = Clock.begin(now=0.0)
    for _ in range(4):
        clock.step(seconds=10.0, data_s=0.0, applied=True)
    saved = clock.to_dict(now=40.0)
    clock.step(seconds=10.0, data_s=0.0, applied=True)  # it is done again after the fault at 50
    again = Clock.resume(saved, now=70.0)
    assert again.restarts == 1 and again.lost_s[FAULTS] == pytest.approx(30.0)
    again.step(seconds=10.0, data_s=0.0, applied=True)
    assert again.goodput(now=80.0) == pytest.approx(50 / 80)
    twice = Clock.resume(again.to_dict(now=80.0), now=100.0)
    assert twice.restarts == 2 and twice.lost_s[FAULTS] == pytest.approx(50.0)


def test_steps_that_were_rolled_back_do_not_count():
    clock = Clock.begin(now=0.0)
    clock.step(seconds=10.0, data_s=0.0, applied=True)
    saved = clock.to_dict(now=10.0)
    for _ in range(3):
        clock.step(seconds=10.0, data_s=0.0, applied=True)
    clock.rolled_back(saved)
    assert clock.productive_s == pytest.approx(10.0) and clock.lost_s[DROPPED] == pytest.approx(30.0)
    assert clock.goodput(now=40.0) == pytest.approx(0.25)


def test_saving_is_a_cause_of_its_own():
    clock = Clock.begin(now=0.0)
    clock.lose(CHECKPOINTS, 5.0)
    assert clock.shares(now=50.0)[CHECKPOINTS] == pytest.approx(0.1)
