"""What `test_chaos.py` puts on the path of a run's workers: every rank notes which samples each step read.

One file per process in $LATENTRAY_TEST_LEDGER, a line per step: `run`, `step`, `attempt`, `rank`, `world`, `at` (seconds
since the epoch), `ids` (epoch and index of each sample) and the keys of those that were `damaged`.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

_LOOP = "latentray.training.loop"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the training loop as always, and wraps its step once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != _LOOP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def loaded(module):
            load(module)
            module._Loop._step = _noting(module._Loop._step)

        spec.loader.exec_module = loaded
        return spec


def _noting(step_of):
    folder = Path(os.environ["LATENTRAY_TEST_LEDGER"])

    def step(self, batches, samples, seen, lr):
        def noted():
            batch = next(batches)
            line = {
                "run": self.worker.run,
                "step": samples // self.config.global_batch_size,
                "attempt": self.worker.attempt,
                "rank": self.worker.rank,
                "world": self.worker.world,
                "at": time.time(),
                "ids": [[one.epoch, one.index] for one in batch.ids],
                "damaged": [one.key for one in batch.damaged],
            }
            with open(folder / f"{self.worker.attempt}-{os.getpid()}.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            yield batch

        return step_of(self, noted(), samples, seen, lr)

    return step


if "LATENTRAY_TEST_LEDGER" in os.environ:
    sys.meta_path.insert(0, _Finder())
