"""The view of a job on a terminal: what it says, how it goes on by itself, and what is printed beside it."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from latentray.reporting import live
from latentray.reporting.live import State, View
from latentray.reporting.progress import Progress


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STATE = State(
    samples=250, total=1000, samples_per_second=25.0, loss=0.5, data_wait_share=0.02, checkpoint_age=4.0, restarts=2,
    goodput=0.87,
)  # fmt: skip


def drawn(view: View) -> str:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(view.render())
    return capture.get()


def test_everything_that_is_known_is_shown():
    view = View("diffusion", 1000, stream=io.StringIO(), clock=_Clock())
    view.hear(STATE)
    text = drawn(view)
    told = "diffusion", "25%", "250 of 1,000 samples", "30 s left", "loss 0.5", "25 samples/s", "data wait 2%"
    for one in (*told, "checkpoint 4.0 s old", "2 restarts", "goodput 87%"):
        assert one in text, one


def test_times_go_on_while_nothing_is_heard_and_it_is_said():
    clock = _Clock()
    view = View("diffusion", 1000, stream=io.StringIO(), clock=clock)
    view.hear(STATE)
    assert "nothing was heard" not in drawn(view)
    clock.now += 12.0
    text = drawn(view)
    assert "checkpoint 16 s old" in text and "18 s left" in text and "nothing was heard for 12 s" in text
    view.hear(State(samples=1000, total=1000))
    clock.now += 100.0
    assert "nothing was heard" not in drawn(view), "a job that is done is quiet"


def test_what_is_not_known_is_left_out():
    assert live.facts(State(samples=1, total=2)) == []
    assert "left" not in drawn(View("x", 0, stream=io.StringIO(), clock=_Clock()))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_a_sparkline_is_monotone_in_its_values(values):
    line = live.sparkline(values)
    assert len(line) == len(values)
    for (a, x), (b, y) in zip(zip(values, line, strict=True), sorted(zip(values, line, strict=True)), strict=True):
        assert (a <= b) <= (x <= y) or a > b
    if max(values) > min(values):
        assert {line[values.index(max(values))], line[values.index(min(values))]} == {"█", "▁"}


def test_a_falling_loss_is_drawn_falling():
    assert live.sparkline([7, 6, 5, 4, 3, 2, 1, 0]) == "█▇▆▅▄▃▂▁"
    assert live.sparkline([]) == "" and live.sparkline([2.0, 2.0]) == "▁▁"


def test_what_is_printed_meanwhile_stands_above_the_view(monkeypatch):
    terminal = _Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with Progress(10, "stage 1") as progress:
        progress.update(5, loss=0.5)
        print("checkpoint failed (1 in a row)")
        progress.update(10, loss=0.4)
    written = terminal.getvalue()
    assert written.index("checkpoint failed (1 in a row)") < written.rindex("10 of 10 samples")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_be_drawn_on_gets_lines(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    terminal = _Terminal()
    with Progress(10, "stage 1", stream=terminal) as progress:
        progress.update(10, loss=0.5)
    assert "stage 1  100%  10/10 samples  loss 0.5" in terminal.getvalue()
    assert "\x1b[" not in terminal.getvalue()
