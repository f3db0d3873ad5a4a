"""Figures of a whole run from the lines of its metrics: over attempts, gaps and lines that are no steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentray.tracking import names
from latentray.training import run_figures

RATE, LOSS = names.TRAIN_SAMPLES_PER_SECOND, names.TRAIN_LOSS


def _step(samples, time, **more):
    return {"samples": samples, "time": time, RATE: 10.0, **more}


def test_time_runs_from_the_first_step_to_the_last_and_not_to_what_the_export_adds():
    records = [_step(100, 1000.0), _step(200, 1010.0), {"samples": 200, "time": 1500.0, "validation/psnr": 20.0}]
    assert run_figures.seconds(records) == pytest.approx(
        10.0 + 100 / 10.0
    )  # the first line tells of the 10 s before it
    assert run_figures.seconds([]) is None
    assert run_figures.seconds(records[2:]) is None


def test_counts_that_begin_anew_with_each_attempt_are_summed():
    counts = [(0, 1), (0, 3), (1, 0), (1, 2), (2, 0)]
    records = [
        _step(i, i, **{names.RUN_RESTARTS: attempt, names.TRAIN_DROPPED_STEPS: dropped})
        for i, (attempt, dropped) in enumerate(counts)
    ]
    assert run_figures.over_attempts(records, names.TRAIN_DROPPED_STEPS) == 5
    assert run_figures.over_attempts(records, names.TRAIN_ROLLBACKS) is None


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_what_is_no_number_counts_for_nothing(values):
    clean = [{"samples": i, LOSS: value} for i, value in enumerate(values)]
    noisy = [line for record in clean for line in (record, {"samples": record["samples"], LOSS: "nan"}, {"samples": 1})]
    for figure in (run_figures.last, run_figures.median, run_figures.most):
        assert figure(noisy, LOSS) == figure(clean, LOSS)
    assert run_figures.most(clean, LOSS) == max(values)
    assert run_figures.last(clean, LOSS) == values[-1]


def test_the_shares_of_time_are_those_of_the_last_line():
    lost = {names.lost_to("faults"): 0.3, names.lost_to("data"): 0.1}
    records = [_step(1, 1.0, **{names.RUN_GOODPUT: 0.9}), _step(2, 2.0, **{names.RUN_GOODPUT: 0.6}, **lost)]
    assert run_figures.time_shares(records) == {"steps": 0.6, "faults": 0.3, "data": 0.1}
    assert run_figures.time_shares(records[:0]) == {}


def test_only_a_run_that_came_to_its_end_has_hours_to_compare():
    records = [_step(10, 0.0, **{names.TRAIN_PEAK_MEMORY_BYTES: 5}), _step(36_000, 3599.0)]
    assert run_figures.actual(records, finished=True) == {
        "samples_per_second": 10.0,
        "peak_memory_bytes": 5.0,
        "hours": 1.0,
    }
    assert "hours" not in run_figures.actual(records, finished=False)
    assert run_figures.actual([], finished=True) == {}
