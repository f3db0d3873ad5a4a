"""What a user at a terminal sees of a run under Ray: rank 0 is elsewhere, and the driver draws."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import threading
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
ROWS, COLUMNS = 40, 110


def drained(terminal: int) -> tuple[list[bytes], threading.Thread]:
    """What arrives at a terminal, read by a thread until its other end is closed."""
    read: list[bytes] = []

    def drain() -> None:
        try:
            while piece := os.read(terminal, 65536):
                read.append(piece)
        except OSError:  # the other end is closed
            return

    thread = threading.Thread(target=drain)
    thread.start()
    return read, thread


def test_a_terminal_shows_progress_loss_rate_wait_and_checkpoints_and_the_workers_print_no_lines(job) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    read, thread = drained(ours)
    temporary = tempfile.mkdtemp(prefix="lr-")
    environ = job.environ() | {"RAY_TMPDIR": temporary, "TERM": "xterm-256color"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.train", *job.overrides("seen")],
            cwd=ROOT, env=environ, stdout=theirs, stderr=theirs, stdin=theirs, timeout=600, check=False,
        )  # fmt: skip
    finally:
        os.close(theirs)
        job.end_all()
    thread.join(10)
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(read).decode(errors="replace"))
    assert done.returncode == 0, text[-3000:]
    frames = text.split("╭─ diffusion")[1:]
    assert len(frames) > 5
    last = frames[-1]
    for told in ("100%  1,920 of 1,920 samples", "samples/s", "data wait", "goodput", "Result: "):
        assert told in last, last
    assert any(re.search(r"loss \d.*checkpoint .* old", frame) for frame in frames)
    assert any(" left " in frame for frame in frames)
    assert "1,920/1,920 samples" not in text, "what is drawn is not printed too"
