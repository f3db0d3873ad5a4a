"""A trainer without a network: ranks read their slices, the driver commits steps and, now and then, the cursor.

python consumer.py <data set> <state folder> <world> <loader workers> <last step> [seconds per step]

What a trainer does with its checkpoint is done with two files: `consumed.jsonl`, the keys of every step, and
`cursor.json`, which says how many of them count. A life begins where the cursor of the one before stands.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

from latentray.checkpoint import store
from latentray.data.ordering import Cursor, Order
from latentray.data.picture_batches import picture_batches
from latentray.data.pipeline import OrderedSource
from latentray.data.shards import IndexedShards
from latentray.data.transforms import Augment

BATCH, EVERY = 24, 5


def order_of(data: IndexedShards) -> Order:
    return Order.of(data.count, 11, BATCH, digest=data.digest)


def rank(uri: str, number: int, world: int, workers: int, first: int, last: int, pipe) -> None:
    data = IndexedShards.open(uri)
    source = OrderedSource([data], order_of(data), rank=number, world=world, first_step=first, last_step=last)
    for batch in picture_batches(source, shapes=[(8, 8)], augment=Augment(), workers=workers):
        pipe.send([(one.epoch, data.key(one.index)) for one in batch.ids])
    pipe.close()


def main() -> None:
    uri, folder = sys.argv[1], Path(sys.argv[2])
    world, workers, last = (int(value) for value in sys.argv[3:6])
    pause = float(sys.argv[6]) if len(sys.argv) > 6 else 0.0
    order = order_of(IndexedShards.open(uri))
    at, log = folder / "cursor.json", folder / "consumed.jsonl"
    cursor = Cursor.from_dict(json.loads(at.read_text())) if at.exists() else order.cursor(0)
    order = order.resume(cursor)
    lines = log.read_text().splitlines()[: cursor.step] if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines))
    fork = multiprocessing.get_context("fork")
    ranks, pipes = [], []
    for number in range(world):
        ours, theirs = fork.Pipe(duplex=False)
        ranks.append(fork.Process(target=rank, args=(uri, number, world, workers, cursor.step, last, theirs)))
        ranks[-1].start()
        theirs.close()
        pipes.append(ours)
    print("pids", os.getpid(), *(one.pid for one in ranks), flush=True)
    with open(log, "a") as file:
        for step in range(cursor.step, last):
            try:
                keys = [key for pipe in pipes for key in pipe.recv()]
            except EOFError:
                os._exit(3)  # a rank died: this life is over
            file.write(json.dumps(keys) + "\n")
            file.flush()
            if (step + 1) % EVERY == 0 or step + 1 == last:
                store.write_json(at, order.cursor(step + 1).to_dict())
                print("step", step + 1, flush=True)
            time.sleep(pause)
    for one in ranks:
        one.join()


if __name__ == "__main__":
    main()
