"""Kill -9, again and again, at any world size: each sample exactly once an epoch, in the order of a run without any fault."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from latentray.checkpoint import manifest
from latentray.data import index, shards
from latentray.data.ordering import Order

CONSUMER = Path(__file__).parent / "exactly_once" / "consumer.py"
BATCH = 24
EVEN = [40] * 24
UNEVEN = [13, 61, 29, 44, 17, 58, 35]


def publish(root: Path, sizes: list[int]) -> Path:
    """Shards of so many tiny pictures."""
    folder = root / "built"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    made, first = [], 0
    for number, size in enumerate(sizes):
        some = [
            shards.Sample(key=f"{first + i:05d}", members={"png": buffer.getvalue(), "txt": b"x", "json": b"{}"})
            for i in range(size)
        ]
        made.append(shards.write_shard(some, folder / shards.shard_name(number)))
        first += size
    index.write(made, folder / index.NAME)
    manifest.publish(folder, root / "set", kind="dataset")
    return root / "set"


def live(
    data: Path, state: Path, world: int, workers: int, last: int, *, victim: str | None, draw: random.Random
) -> bool:
    """One life of the trainer, ended by SIGKILL of one of its processes unless `victim` is None. True where it got to its end."""
    pause = 0.0 if victim is None else 0.05
    command = [sys.executable, str(CONSUMER), *map(str, (data, state, world, workers, last, pause))]
    life = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(word) for word in life.stdout.readline().split()[1:]]
        if victim is not None:
            for _ in range(draw.randrange(1, 4)):  # after some checkpoints, and then anywhere between two of them
                if not life.stdout.readline():
                    break
            time.sleep(draw.uniform(0, 0.25))
            _kill(victim, pids, draw)
        return life.wait(timeout=60) == 0
    finally:
        for process in [psutil.Process(p) for p in [life.pid, *pids] if psutil.pid_exists(p)]:
            for one in [*process.children(recursive=True), process]:
                if one.is_running():
                    one.kill()
        life.wait()
        life.stdout.close()


def _kill(victim: str, pids: list[int], draw: random.Random) -> None:
    driver, *ranks = pids
    rank = draw.choice(ranks)
    loaders = psutil.Process(rank).children() if psutil.pid_exists(rank) else []
    chosen = {"driver": driver, "rank": rank, "loader": draw.choice(loaders).pid if loaders else rank}[victim]
    if psutil.pid_exists(chosen):
        os.kill(chosen, signal.SIGKILL)


def consumed(state: Path) -> list[list[tuple[int, str]]]:
    steps = json.loads((state / "cursor.json").read_text())["step"]
    lines = (state / "consumed.jsonl").read_text().splitlines()
    assert len(lines) >= steps
    return [[tuple(pair) for pair in json.loads(line)] for line in lines[:steps]]


def through_faults(tmp_path, sizes, lives, seed):
    data = publish(tmp_path, sizes)
    opened = shards.IndexedShards.open(data)
    order = Order.of(opened.count, 11, BATCH, digest=opened.digest)
    last = 2 * opened.count // BATCH + BATCH  # what an epoch leaves over is read by one stream of the next
    draw = random.Random(seed)
    finished = any(
        live(data, tmp_path, world, workers, last, victim=victim, draw=draw) for world, workers, victim in lives
    )
    while not finished:
        finished = live(data, tmp_path, draw.choice([1, 2, 3]), draw.choice([0, 2]), last, victim=None, draw=draw)
    got = consumed(tmp_path)
    assert got == [[(one.epoch, opened.key(one.index)) for one in order.step(t).ids] for t in range(last)]
    for epoch in range(2):
        keys = sorted(key for step in got for e, key in step if e == epoch)
        assert keys == [f"{i:05d}" for i in range(opened.count)]


def test_two_ranks_killed_then_one_then_three(tmp_path):
    through_faults(tmp_path, EVEN, [(2, 1, "loader"), (1, 0, "rank"), (3, 2, "driver")], seed=1)


def test_uneven_shards_on_two_ranks(tmp_path):
    through_faults(tmp_path, UNEVEN, [(2, 0, "driver"), (2, 2, "loader")], seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_kills_at_random_points_of_any_process(tmp_path, seed):
    draw = random.Random(100 + seed)
    lives = [
        (draw.choice([1, 2, 3]), draw.choice([0, 1, 2]), draw.choice(["loader", "rank", "driver"])) for _ in range(6)
    ]
    through_faults(tmp_path, draw.choice([EVEN, UNEVEN]), lives, seed)
