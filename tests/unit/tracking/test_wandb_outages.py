"""W&B's server fails in every way at every time: no step waits, and the history that comes to it has each step once.

Attempts run in processes of their own, as they do after a fault; `wandb sync` is the real one.
"""

import importlib.util
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from latentray import tracking
from latentray.config.tracking import TrackingConfig
from latentray.tracking import names, offline

_ATTEMPT = """
import json, sys, time
from pathlib import Path
from latentray import tracking
from latentray.config.tracking import TrackingConfig
from latentray.tracking import names

asked = json.loads(sys.argv[1])
config = TrackingConfig(mode=asked["mode"], finish_seconds=asked["finish_seconds"])
tracker = tracking.open(config, "run1", Path(asked["folder"]), {"seed": 0}, resumed_at=asked["resumed_at"])
for step in range(asked["first"], asked["last"] + 1):
    tracker.log(96 * step, {names.TRAIN_LOSS: 1 / step, names.TRAIN_SAMPLES_PER_SECOND: 96.0})
if asked["export"]:
    tracker.log(96 * asked["last"], {names.VALIDATION_PSNR: 25.0})
tracker.finish()
print(json.dumps(tracker.sync_command))
"""


def _fake():
    spec = importlib.util.spec_from_file_location("fake_wandb", Path(__file__).with_name("fake_wandb.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake_wandb = _fake()


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return monkeypatch


def _attempt(folder, first, last, *, mode="online", resumed_at=None, finish_seconds=20.0, export=False) -> str | None:
    """Log steps `first` to `last` of 96 samples each in a process; the tracker's sync command."""
    asked = {"folder": str(folder), "mode": mode, "first": first, "last": last, "export": export}
    asked |= {"resumed_at": resumed_at and 96 * resumed_at, "finish_seconds": finish_seconds}
    done = subprocess.run(
        [sys.executable, "-c", _ATTEMPT, json.dumps(asked)],
        capture_output=True, text=True, check=True, timeout=90, env=os.environ,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def _sync(command: str) -> None:
    subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], capture_output=True, check=True, timeout=60, env=os.environ
    )


def _steps(first, last):
    return [96 * step for step in range(first, last + 1)]


@pytest.mark.parametrize("how", ["nobody listens", "error", "stall"])
def test_a_server_that_is_out_of_order_delays_no_step_and_the_offline_history_is_whole(how, environment, tmp_path):
    with fake_wandb.running("serve" if how == "nobody listens" else how) as server, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}" if how == "nobody listens" else server.url
        environment.setenv("WANDB_BASE_URL", url)
        began = time.monotonic()
        tracker = tracking.open(TrackingConfig(mode="online"), "run1", tmp_path, {"seed": 0})
        took = []
        for step in range(1, 301):
            since = time.perf_counter()
            tracker.log(96 * step, {names.TRAIN_LOSS: 1 / step})
            took.append(time.perf_counter() - since)
        command = tracker.sync_command
        assert time.monotonic() - began < 10.0
        tracker.finish()
    assert np.percentile(took, 95) < 10e-3
    *_, folder = shlex.split(command)
    lines = fake_wandb.history(Path(folder))
    assert [line["_step"] for line in lines] == _steps(1, 300)
    assert [line[names.TRAIN_LOSS] for line in lines] == [pytest.approx(1 / step) for step in range(1, 301)]
    assert offline.last_step(tmp_path, "run1") == 96 * 300


def test_attempts_that_overlap_offline_are_synced_with_each_step_once_under_one_id(environment, tmp_path):
    _attempt(tmp_path, 1, 50, mode="offline")
    time.sleep(1.1)  # W&B names its folders by the second
    command = _attempt(tmp_path, 31, 80, mode="offline", resumed_at=30, export=True)
    with fake_wandb.running() as server:
        environment.setenv("WANDB_BASE_URL", server.url)
        _sync(command)
        assert server.runs == {"run1"}
        assert server.steps == _steps(1, 80)
        assert server.lines[79][names.VALIDATION_PSNR] == 25.0


def test_what_a_killed_attempt_had_not_written_is_taken_from_the_metrics(environment, tmp_path):
    first = shlex.split(_attempt(tmp_path, 1, 50, mode="offline"))[-1]
    (path,) = Path(first).glob("*.wandb")
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(str(1 / 30).encode())])  # in the middle of a record
    kept = [line["_step"] for line in fake_wandb.history(Path(first))]
    assert kept == _steps(1, 29)
    assert offline.last_step(tmp_path, "run1") == 96 * 29
    time.sleep(1.1)
    second = shlex.split(_attempt(tmp_path, 51, 60, mode="offline", resumed_at=50))[-1]
    assert kept + [line["_step"] for line in fake_wandb.history(Path(second))] == _steps(1, 60)


def test_a_run_that_lost_its_server_and_resumes_online_sends_what_the_server_lacks(environment, tmp_path):
    with fake_wandb.running() as server:
        environment.setenv("WANDB_BASE_URL", server.url)
        _attempt(tmp_path, 1, 20)
        assert server.steps == _steps(1, 20)
        server.mode = "error"
        _attempt(tmp_path, 21, 50, resumed_at=20, finish_seconds=5.0)
        server.mode = "serve"
        assert _attempt(tmp_path, 41, 80, resumed_at=40, export=True) is None
        assert server.runs == {"run1"}
        assert server.steps[:80] == _steps(1, 80)


def test_a_run_whose_last_step_was_sent_before_it_was_killed_still_sends_its_figures(environment, tmp_path):
    with fake_wandb.running() as server:
        environment.setenv("WANDB_BASE_URL", server.url)
        _attempt(tmp_path, 1, 20)
        _attempt(tmp_path, 16, 20, resumed_at=15, export=True)
        assert server.steps[:20] == _steps(1, 20)
        assert [line[names.VALIDATION_PSNR] for line in server.lines.values() if names.VALIDATION_PSNR in line] == [
            25.0
        ]
        assert len([line for line in server.lines.values() if names.TRAIN_LOSS in line]) == 20


def test_a_server_that_comes_back_gets_everything(environment, tmp_path):
    with fake_wandb.running() as server:
        environment.setenv("WANDB_BASE_URL", server.url)
        tracker = tracking.open(TrackingConfig(mode="online"), "run1", tmp_path, {})
        tracker.log(96, {names.TRAIN_LOSS: 1.0})
        assert tracker.sync_command is None  # it started online
        server.mode = "error"
        for step in range(2, 41):
            tracker.log(96 * step, {names.TRAIN_LOSS: 1 / step})
        time.sleep(1.0)
        server.mode = "serve"
        tracker.finish()
        assert server.steps == _steps(1, 40)
        assert tracker.sync_command is None
