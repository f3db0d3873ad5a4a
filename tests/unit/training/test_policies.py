"""Decisions about faults, in closed form: what is seen, and what is done."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.config.faults import FaultsConfig
from latentray.errors import ConfigError
from latentray.training import policies
from latentray.training.policies import Answer, Beat

FAULTS = FaultsConfig(spike_factor=20.0, spike_window=64, drops_in_a_row=4, max_rollbacks=2, failed_checkpoints=2)


def test_no_loss_is_a_spike_before_a_quarter_of_the_window_was_seen():
    assert policies.spike_limit([1.0] * 15, FAULTS) == math.inf
    assert policies.spike_limit([1.0] * 16, FAULTS) == 1.0 + 20.0


def test_the_limit_is_the_median_and_so_many_medians():
    losses = [0.5] * 10 + [0.7] * 10 + [1e6]
    assert policies.spike_limit(losses, FAULTS) == pytest.approx(0.7 + 20 * 0.7)


def test_losses_about_zero_are_measured_by_their_deviation():
    losses = [-0.1, 0.1] * 16
    assert policies.spike_limit(losses, FAULTS) == pytest.approx(20 * 1.4826 * 0.1, rel=0.2)


def test_a_factor_of_zero_drops_nothing():
    assert policies.spike_limit([1.0] * 100, FaultsConfig(spike_factor=0)) == math.inf


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-4, 1e4))
def test_ordinary_noise_is_never_a_spike_and_ten_thousandfold_always_is(seed, scale):
    draw = random.Random(seed)
    losses = [scale * draw.lognormvariate(0, 0.5) for _ in range(200)]
    limit = policies.spike_limit(losses[-128:], FaultsConfig())
    assert max(losses) < limit < 1e4 * min(losses[-128:])


def test_so_many_dropped_steps_roll_back_and_so_many_rollbacks_end_the_run():
    assert [policies.after_dropped_step(n, 0, FAULTS) for n in (1, 3, 4)] == [
        Answer.GO_ON,
        Answer.GO_ON,
        Answer.ROLL_BACK,
    ]
    assert policies.after_dropped_step(4, 1, FAULTS) is Answer.ROLL_BACK
    assert policies.after_dropped_step(4, 2, FAULTS) is Answer.STOP
    assert policies.after_broken_weights(1, FAULTS) is Answer.ROLL_BACK
    assert policies.after_broken_weights(2, FAULTS) is Answer.STOP


def test_checkpoints_may_fail_so_often_in_a_row():
    assert [policies.after_failed_checkpoint(n, FAULTS) for n in (0, 2, 3)] == [Answer.GO_ON, Answer.GO_ON, Answer.STOP]


def beat(rank: int, **changes) -> Beat:
    usual = dict(host="a", pid=100 + rank, step=7, in_step_s=1.0, silent_s=0.5, watched=True)
    return Beat(rank=rank, **(usual | changes))


def hang(*beats: Beat):
    return policies.hang({one.rank: one for one in beats}, FaultsConfig(silent_s=15, step_timeout_s=100))


def test_ranks_that_live_and_step_do_not_hang():
    assert hang(beat(0), beat(1, step=8), beat(2, in_step_s=99.0, silent_s=14.0)) is None


def test_a_silent_process_is_named_before_those_that_wait_for_it():
    found = hang(beat(0, in_step_s=300.0), beat(1, silent_s=16.0, step=6), beat(2, in_step_s=300.0))
    assert found is not None and found.silent and found.beat.rank == 1
    assert "rank 1 (process 101 on a) at step 6 gave no sign of life for 16 s" in str(found)


def test_the_rank_that_is_furthest_behind_is_named():
    found = hang(beat(0, in_step_s=150.0), beat(1, step=6, in_step_s=120.0), beat(2, in_step_s=160.0))
    assert found is not None and not found.silent and found.beat.rank == 1
    assert "has been there for 120 s" in str(found)


def test_loading_and_exporting_may_take_long_and_the_first_step_longer_than_others():
    assert hang(beat(0, in_step_s=5000.0, watched=False)) is None
    assert hang(beat(0, step=-1, in_step_s=250.0)) is None
    assert hang(beat(0, step=-1, in_step_s=301.0)) is not None
    assert hang(beat(0, in_step_s=5000.0, watched=False, silent_s=20.0)) is not None


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"spike_factor": 0.5}, "faults.spike_factor"),
        ({"drops_in_a_row": 0}, "faults.drops_in_a_row"),
        ({"max_rollbacks": -1}, "faults.max_rollbacks"),
        ({"silent_s": 1}, "faults.silent_s"),
        ({"silent_s": 60, "step_timeout_s": 30}, "faults.silent_s"),
    ],
)
def test_settings_out_of_bounds_are_refused_by_name(changes, where):
    with pytest.raises(ConfigError) as caught:
        FaultsConfig(**changes)
    assert caught.value.where == where
