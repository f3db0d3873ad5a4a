"""The block cache: exact bytes, nothing fetched twice while it fits, bounded, and stubborn within its budget only."""

import concurrent.futures
import os
import pickle
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data.blocks import BlockCache
from latentray.records import Traffic

CONTENT = np.random.default_rng(0).integers(0, 256, 10_000, dtype=np.uint8).tobytes()


class Remote:
    """A file behind a network: counts requests, and fails as it is told to."""

    def __init__(self, content: bytes = CONTENT, failures: int = 0, cut: int = 0) -> None:
        self.content, self.failures, self.cut, self.requests = content, failures, cut, []

    def __call__(self, uri: str, offset: int, length: int) -> bytes:
        self.requests.append((offset, length))
        if uri.endswith("none"):
            raise FileNotFoundError(uri)
        if self.failures:
            self.failures -= 1
            raise OSError("503 slow down")
        if self.cut:
            self.cut -= 1
            return self.content[offset : offset + length // 2]
        return self.content[offset : offset + length]


def cache(folder, remote, *, capacity=1 << 20, block=64, budget=5.0) -> BlockCache:
    return BlockCache(folder, capacity_bytes=capacity, budget_s=budget, block_bytes=block, read=remote)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_050), st.integers(0, 3000)), min_size=1, max_size=8), st.integers(1, 999))
def test_any_range_has_the_files_bytes(tmp_path_factory, ranges, block):
    remote = Remote()
    blocks = cache(tmp_path_factory.mktemp("cache"), remote, block=block)
    for offset, length in ranges:
        assert blocks.read("s3://b/a", len(CONTENT), offset, length) == CONTENT[offset : offset + length]
    assert sum(length for _, length in remote.requests) <= len(CONTENT)  # no byte comes twice


def test_neighbours_come_in_one_request_and_later_from_the_disk(tmp_path):
    remote = Remote()
    blocks = cache(tmp_path, remote)
    blocks.read("s3://b/a", len(CONTENT), 130, 300)
    assert remote.requests == [(128, 320)]
    blocks.read("s3://b/a", len(CONTENT), 0, 640)
    assert remote.requests[1:] == [(0, 128), (448, 192)]
    assert blocks.traffic() == Traffic(fetched_bytes=640, cached_bytes=320)
    again = cache(tmp_path, remote)  # another process of the node
    again.read("s3://b/a", len(CONTENT), 0, 640)
    assert len(remote.requests) == 3
    again.read("s3://b/other", len(CONTENT), 0, 64)
    assert len(remote.requests) == 4


def test_the_folder_stays_bounded_and_keeps_what_was_used_last(tmp_path):
    remote = Remote()
    blocks = cache(tmp_path, remote, capacity=40 * 64)
    blocks.read("s3://b/a", len(CONTENT), 0, 64)
    for first in range(64, len(CONTENT), 640):
        blocks.read("s3://b/a", len(CONTENT), first, 640)
        for path in tmp_path.glob("*/0-*"):
            os.utime(path, ns=(time.time_ns() + 10**9,) * 2)  # the first block is used all the time
        assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 60 * 64
    requests = len(remote.requests)
    blocks.read("s3://b/a", len(CONTENT), 0, 64)
    assert len(remote.requests) == requests


def test_failures_and_cut_bodies_are_tried_again_within_the_budget(tmp_path):
    remote = Remote(failures=2, cut=1)
    blocks = cache(tmp_path, remote)
    assert blocks.read("s3://b/a", len(CONTENT), 0, 100) == CONTENT[:100]
    assert blocks.traffic().retries == 3
    down = cache(tmp_path / "down", Remote(failures=10**9), budget=0.3)
    began = time.perf_counter()
    with pytest.raises(OSError, match="503"):
        down.read("s3://b/a", len(CONTENT), 0, 100)
    assert time.perf_counter() - began < 5


def test_a_file_that_is_not_there_is_not_tried_again(tmp_path):
    remote = Remote()
    with pytest.raises(FileNotFoundError):
        cache(tmp_path, remote).read("s3://b/none", 100, 0, 10)
    assert len(remote.requests) == 1


def test_a_damaged_block_can_be_forgotten(tmp_path):
    remote = Remote()
    blocks = cache(tmp_path, remote)
    blocks.read("s3://b/a", len(CONTENT), 0, 200)
    victim = next(tmp_path.glob("*/1-*"))
    victim.write_bytes(b"x" * 64)
    assert blocks.read("s3://b/a", len(CONTENT), 0, 200) != CONTENT[:200]
    blocks.forget("s3://b/a", 100, 10)
    assert blocks.read("s3://b/a", len(CONTENT), 0, 200) == CONTENT[:200]


def test_threads_share_one_cache(tmp_path):
    blocks = cache(tmp_path, Remote(), capacity=2000)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        starts = [37 * i % 9000 for i in range(400)]
        got = list(pool.map(lambda start: blocks.read("s3://b/a", len(CONTENT), start, 333), starts))
    assert got == [CONTENT[start : start + 333] for start in starts]


def test_it_travels_to_a_loader_process(tmp_path):
    blocks = BlockCache(tmp_path, capacity_bytes=1000, budget_s=1.0)
    sent = pickle.loads(pickle.dumps(blocks))
    assert (sent.folder, sent.capacity, sent.budget_s, sent.block) == (tmp_path, 1000, 1.0, blocks.block)


def test_threads_fetch_different_blocks_of_a_file_side_by_side_and_none_twice(tmp_path):
    at_once = threading.Barrier(4, timeout=20)  # it opens only where four requests are on their way together
    remote = Remote()

    def together(uri: str, offset: int, length: int) -> bytes:
        data = remote(uri, offset, length)
        at_once.wait()
        return data

    blocks = cache(tmp_path, together)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        wanted = [0, 0, 64, 64, 128, 128, 192, 192]
        got = list(pool.map(lambda offset: blocks.read("s3://b/a", len(CONTENT), offset, 64), wanted))
    assert got == [CONTENT[offset : offset + 64] for offset in wanted]
    assert sorted(remote.requests) == [(0, 64), (64, 64), (128, 64), (192, 64)]
