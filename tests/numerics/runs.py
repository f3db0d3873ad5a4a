"""The training runs that the tests of this folder compare: several, one after the other, in one process per rank.

    [torchrun --nproc-per-node 2] runs.py <jobs.json> <port>

A job has `overrides`, and `die_at`: the process ends, as if killed, once the checkpoint of that step is written; `kill_at`,
where it is killed then; or `inject`, faults of `injected.py`. Beside each result it leaves `raw.safetensors`, the weights that
the EMA averages.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import injected
import torch
import torch.distributed as dist

from latentray.checkpoint import manifest, store, weights
from latentray.config import compose
from latentray.config.train import Train
from latentray.errors import LatentrayError
from latentray.training import here, launch, loop

KILLED = 9


def keeping_raw(finish):
    @functools.wraps(finish)
    def wrapped(self, ema):
        state = self.engine.full_state()
        held = "\n".join(injected.state_of(engine) for engine in self.engines.values())
        store.write_bytes(store.join(self.worker.out, f"state-{self.worker.rank}.txt"), held.encode())
        if self.worker.leads:
            with store.staging() as folder:
                weights.save(folder / "raw.safetensors", state)
                store.upload(folder / "raw.safetensors", store.join(self.worker.out, "raw.safetensors"))
        return finish(self, ema)

    return wrapped


def _join() -> None:
    """One process group for all jobs: DeepSpeed keeps the groups it made, and cannot go on without them."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = sys.argv[2]
    dist.init_process_group("gloo")
    dist.init_process_group = dist.destroy_process_group = lambda *_args, **_kwargs: None


def _with(work, own: loop.Hooks, *args, hooks: loop.Hooks, **kwargs) -> bool:
    return work(*args, hooks=own, **kwargs)


def main() -> None:
    for stage in loop.STAGES.values():
        stage.finish = keeping_raw(stage.finish)
    work = here.work
    _join()
    for job in json.loads(Path(sys.argv[1]).read_text()):

        def die(
            uri: str, step: int, at: int | None = job.get("die_at"), kill_at: int | None = job.get("kill_at")
        ) -> None:
            if step in (at, kill_at):
                while not store.exists(store.join(uri, manifest.NAME)):  # a thread of rank 0 writes it
                    time.sleep(0.05)
                if step == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                os._exit(KILLED)

        here.work = functools.partial(_with, work, loop.Hooks(on_checkpoint=die))
        torch.manual_seed(0)  # as in a process of its own: nothing that a job draws is left to the next
        undo = injected.install(job.get("inject", {}))
        try:
            launch.train(compose.load("train", Train, job["overrides"]))
        except LatentrayError as error:
            print(f"{job['name']} ended: {type(error).__name__}: {error}", flush=True)
        for one in undo:
            one()


if __name__ == "__main__":
    main()
