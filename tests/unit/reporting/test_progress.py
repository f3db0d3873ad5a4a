"""Progress: plain lines at a bounded rate in a pipe, a bar on a terminal."""

import io

import pytest

from latentray.reporting.progress import Progress, duration


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_at_most_every_n_seconds_and_the_last_one_always():
    clock, stream = _Clock(), io.StringIO()
    with Progress(1000, "stage 2", every_seconds=10, stream=stream, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 3
            progress.update(100 * step, loss=1 / step, data_wait_share=0.02)
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["10%", "50%", "90%", "100%"]
    assert "loss 1 " in lines[0]
    assert "33 samples/s" in lines[0]
    assert "data wait 2%" in lines[0]
    assert "27 s left" in lines[0]
    assert "1,000/1,000 samples" in lines[-1]
    assert "done in 30 s" in lines[-1]


def test_the_last_state_is_not_printed_twice():
    stream = io.StringIO()
    progress = Progress(10, "x", stream=stream, clock=_Clock())
    progress.update(10)
    progress.close()
    progress.close()
    assert len(stream.getvalue().splitlines()) == 1


def test_a_resumed_run_measures_its_own_rate():
    clock, stream = _Clock(), io.StringIO()
    progress = Progress(1000, "x", start_samples=500, stream=stream, clock=clock)
    clock.now += 10
    progress.update(600)
    assert " 60%" in stream.getvalue()
    assert "10 samples/s" in stream.getvalue()
    assert "40 s left" in stream.getvalue()


def test_a_terminal_gets_a_bar():
    stream = _Terminal()
    with Progress(10, "stage 1", stream=stream) as progress:
        progress.update(10, loss=0.5)
    assert "stage 1" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()


def test_nothing_to_say_prints_nothing():
    stream = io.StringIO()
    Progress(10, "x", stream=stream).close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min"), (582, "9 min 42 s"), (720, "12 min"), (11100, "3 h 05 min")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
