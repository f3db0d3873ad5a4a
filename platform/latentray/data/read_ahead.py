"""Reading one batch ahead of the step that uses it, in a thread: reading and decoding leave Python's lock to the step."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in a thread while the one before is used; an error comes in its item's place."""
    end = object()
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        waiting = collections.deque([pool.submit(next, items, end)])
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]
