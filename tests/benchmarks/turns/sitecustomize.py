"""What `test_training_overhead.py` puts on the path of two runs, so that they take turns and are timed alike.

Both live at the same time; of $LATENTRAY_TEST_BLOCKS blocks of $LATENTRAY_TEST_BLOCK steps only one runs at a time, and the
other waits, all its ranks, before its next block. Rank 0 notes when each step begins: from there to the next is all that a
step costs, with its metrics and whatever its surroundings take.
"""

import importlib.abc
import importlib.util
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
            module._Loop._step = _in_turns(module._Loop._step)

        spec.loader.exec_module = loaded
        return spec


def _in_turns(step_of):
    folder, me = Path(os.environ["LATENTRAY_TEST_TURNS"]), int(os.environ["LATENTRAY_TEST_TURN"])
    block, blocks = int(os.environ["LATENTRAY_TEST_BLOCK"]), int(os.environ["LATENTRAY_TEST_BLOCKS"])

    def note(number):
        with open(folder / f"{me}.txt", "a") as file:
            file.write(f"{number} {time.perf_counter()}\n")

    def step(self, batches, samples, seen, lr):
        number = samples // self.config.global_batch_size
        if self.worker.leads:
            note(number)
        turn = number // block
        if number % block == 0 and turn < blocks:
            if self.worker.leads:
                (folder / f"reached-{me}-{turn}").touch()
            # A B, B A, A B, ...: who is second in a pair waits for the other to come to its next block, who is first does not.
            second = (turn + me) % 2 == 1
            before = folder / f"reached-{1 - me}-{turn + 1 if second else turn}"
            while not before.exists():
                time.sleep(0.005)
            if self.worker.leads:
                note(number)
        elif turn == blocks and self.worker.leads:
            (folder / f"reached-{me}-{turn}").touch()
        return step_of(self, batches, samples, seen, lr)

    return step


if "LATENTRAY_TEST_TURNS" in os.environ:
    sys.meta_path.insert(0, _Finder())
