"""How a run hears that it shall stop: a signal, a file, and stores that fail or do not answer."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from latentray.checkpoint import store
from latentray.training import stopping
from latentray.training.stopping import Stop


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(stopping, "_EVERY_S", 0.01)
    monkeypatch.setattr(stopping, "_LOOK_S", 0.01)


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 5
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def test_a_request_is_heard_by_rank_0_and_forgotten_by_the_next_attempt(quick, tmp_path):
    leading, following = Stop(str(tmp_path), leads=True), Stop(str(tmp_path), leads=False)
    assert not leading.asked
    stopping.request(str(tmp_path))
    assert eventually(lambda: leading.asked)
    assert not following.asked, "it hears of it from rank 0, with the next step"
    assert stopping.requested(str(tmp_path))
    stopping.clear(str(tmp_path))
    assert not stopping.requested(str(tmp_path))
    stopping.clear(str(tmp_path))  # nothing is there
    again = Stop(str(tmp_path), leads=True)
    time.sleep(0.1)
    assert not again.asked
    for one in (leading, following, again):
        one.close()


def test_a_store_that_raises_is_asked_again(quick, tmp_path, monkeypatch):
    stopping.request(str(tmp_path))
    failures = [OSError("no route"), ConnectionResetError("gone"), TimeoutError()]
    exists = store.exists

    def out_of_order(uri):
        if failures:
            raise failures.pop()
        return exists(uri)

    monkeypatch.setattr(store, "exists", out_of_order)
    stop = Stop(str(tmp_path), leads=True)
    assert eventually(lambda: stop.asked) and not failures
    stop.close()


def test_a_store_that_does_not_answer_holds_nobody_up(quick, tmp_path, monkeypatch):
    answers, asked = threading.Event(), threading.Event()

    def silent(uri):
        asked.set()
        answers.wait(30)
        return False

    monkeypatch.setattr(store, "exists", silent)
    began = time.perf_counter()
    stop = Stop(str(tmp_path), leads=True)
    assert asked.wait(5)
    with stop.on_signal():
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(lambda: stop.asked), "a signal is heard all the same"
    stop.close()
    assert time.perf_counter() - began < 5
    answers.set()


def test_the_signal_means_what_it_meant_before_once_training_is_over(tmp_path):
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        stop = Stop(str(tmp_path), leads=False)
        with stop.on_signal():
            os.kill(os.getpid(), signal.SIGTERM)
            assert eventually(lambda: stop.asked)
        assert not heard
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(lambda: heard == [signal.SIGTERM])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_that_hears_no_signals_trains_all_the_same(tmp_path):
    stop, before = Stop(str(tmp_path), leads=False), signal.getsignal(signal.SIGTERM)
    inside: list[object] = []

    def train() -> None:
        with stop.on_signal():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert inside == [before]


def wait(seconds: float) -> float:
    """As a driver waits for its workers; how long it did."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        time.sleep(0.01)
    return time.monotonic() - began


def test_a_driver_hands_the_signal_on_to_workers_and_waits_for_them(quick, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with stopping.handed_on(str(tmp_path), lambda: 0.5) as asked:
        assert not asked.is_set() and not stopping.requested(str(tmp_path))
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(lambda: stopping.requested(str(tmp_path)))
        assert wait(0.3) >= 0.3, "they are at work: it is theirs to end"
    assert asked.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_driver_that_was_not_asked_waits_for_workers_for_ever(quick, tmp_path):
    with stopping.handed_on(str(tmp_path), lambda: 1e6) as asked:
        assert wait(0.3) >= 0.3
    assert not asked.is_set() and not stopping.requested(str(tmp_path))


def test_a_driver_that_is_asked_leaves_where_nobody_is_at_work(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stopping, "PATIENCE_S", 0.3)
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    silent = iter([None, None])  # the board is busy: nobody can tell
    with stopping.handed_on(str(tmp_path), lambda: next(silent, time.monotonic() - began)) as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        wait(30)
    assert asked.is_set() and 0.3 < time.monotonic() - began < 5
    assert "no worker is at work: there is nothing to save" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_store_that_is_out_does_not_keep_a_driver(quick, tmp_path, monkeypatch, capsys):
    def out_of_order(uri, value):
        raise OSError("no route")

    monkeypatch.setattr(store, "write_json", out_of_order)
    began, told = time.monotonic(), []
    with stopping.handed_on(str(tmp_path), lambda: 1e6):
        os.kill(os.getpid(), signal.SIGTERM)
        wait(30)
    assert time.monotonic() - began < 5
    assert eventually(lambda: told.append(capsys.readouterr().out) or "asked to stop: no route" in "".join(told))


def test_ctrl_c_and_errors_pass(quick, tmp_path):
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), stopping.handed_on(str(tmp_path), lambda: 0.0):
            raise error
