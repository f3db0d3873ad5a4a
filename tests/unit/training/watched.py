"""Small worlds of processes that a Watchdog watches while they meet faults, all at the same time, for `test_watchdog.py`.

    python watched.py <folder> <scenarios as JSON>

A scenario is a name -> `world` and, by rank, what happens to it 2 s after the start: `stop` (SIGSTOP), `kill`, `stand`
(its step does not end), `end` (it is done), or `pause` (SIGSTOP, and SIGCONT after so many seconds). The ranks write to
`<folder>/<name>/<rank>.log`, and how they ended is the JSON that is printed: name -> exit codes by rank, None of one that was
still there at the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from latentray.config.faults import FaultsConfig
from latentray.config.train import Train
from latentray.training.state import Worker
from latentray.training.watchdog import Watchdog

FAULTS = FaultsConfig(silent_s=5, step_timeout_s=8)
BEGINS_S, LASTS_S = 2.0, 16.0


def rank_of(folder: Path, rank: int, world: int, fate: str | None) -> None:
    os.dup2(os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY), 1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "join"), world), rank=rank, world_size=world)
    worker = Worker(
        config=Train(),
        run="watched",
        out=str(folder),
        rank=rank,
        world=world,
        device=torch.device("cpu"),
        attempt="one",
    )
    dog = Watchdog(worker, FAULTS)
    dist.barrier()
    (folder / f"{rank}.ready").touch()
    began = time.monotonic()
    step = 0
    while (now := time.monotonic() - began) < LASTS_S:
        if not (fate == "stand" and now > BEGINS_S):
            dog.at(step)
            step += 1
        if fate == "end" and now > BEGINS_S:
            break
        time.sleep(0.1)
    dog.close()
    if rank == 0:
        time.sleep(1.0)  # the store is served until all have said that they are done
    os._exit(0)


def main() -> None:
    root, scenarios = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    found: dict[str, dict[int, int]] = {}
    for name, scenario in scenarios.items():
        (root / name).mkdir(parents=True)
        found[name] = {}
        for rank in range(scenario["world"]):
            pid = os.fork()
            if not pid:
                rank_of(root / name, rank, scenario["world"], scenario["fates"].get(str(rank)))
            found[name][rank] = pid
    while len(list(root.glob("*/*.ready"))) < sum(map(len, found.values())):
        time.sleep(0.05)
    time.sleep(BEGINS_S)
    paused: list[tuple[int, float]] = []
    for name, scenario in scenarios.items():
        for rank, fate in scenario["fates"].items():
            pid = found[name][int(rank)]
            if fate in ("stop", "kill"):
                os.kill(pid, signal.SIGSTOP if fate == "stop" else signal.SIGKILL)
            if fate.startswith("pause"):
                os.kill(pid, signal.SIGSTOP)
                paused.append((pid, time.monotonic() + float(fate.split()[1])))
    for pid, until in sorted(paused, key=lambda one: one[1]):
        time.sleep(max(until - time.monotonic(), 0.0))
        os.kill(pid, signal.SIGCONT)
    ended = {name: {rank: _ended(pid) for rank, pid in ranks.items()} for name, ranks in found.items()}
    print(json.dumps(ended), flush=True)


def _ended(pid: int) -> int | None:
    until = time.monotonic() + LASTS_S
    while time.monotonic() < until:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


if __name__ == "__main__":
    main()
