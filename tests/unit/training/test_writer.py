"""The thread that writes checkpoints: one at a time, and a failure is counted, not raised."""

import threading
import time

from latentray.training.writer import Writer


def test_the_loop_goes_on_while_a_job_runs_and_the_next_waits_for_it():
    writer, may_end, order = Writer(), threading.Event(), []
    writer.start(lambda: (may_end.wait(5), order.append("first")))
    assert order == []
    threading.Timer(0.1, may_end.set).start()
    begun = time.perf_counter()
    writer.start(lambda: order.append("second"))
    assert order[:1] == ["first"] and time.perf_counter() - begun > 0.05
    writer.wait()
    assert order == ["first", "second"]


def test_who_waits_for_so_long_is_told_whether_the_job_is_done():
    writer, may_end = Writer(), threading.Event()
    assert writer.wait(0.0), "none runs"
    writer.start(lambda: may_end.wait(30))
    assert not writer.wait(0.05)
    may_end.set()
    assert writer.wait(30) and writer.wait(0.0)


def test_failures_in_a_row_are_counted_until_one_succeeds(capsys):
    def full() -> None:
        raise OSError(28, "No space left on device")

    writer = Writer()
    for _ in range(2):
        writer.start(full)
        writer.wait()
    assert writer.failures == 2
    assert "checkpoint failed (2 in a row): [Errno 28] No space left on device" in capsys.readouterr().out
    writer.start(lambda: None)
    writer.wait()
    assert writer.failures == 0
