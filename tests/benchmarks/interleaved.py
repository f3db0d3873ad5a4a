"""Timing calls in turn, and the ceiling that products and convolutions set."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

REPEATS = 9
PRODUCTS = (nn.Conv2d, nn.Linear)


def medians(calls: Mapping[str, Callable[[], object]], *, warm_ups: int = 2) -> dict[str, float]:
    """Median seconds of each call, in turn: CPU time of the one thread, which other work on the machine disturbs least."""
    for call in calls.values():
        for _ in range(warm_ups):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            begin = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - begin)
    return {name: statistics.median(many) for name, many in seconds.items()}


def products_of(
    net: nn.Module, call: Callable[[], object], kinds: tuple[type[nn.Module], ...] = PRODUCTS
) -> Callable[[], None]:
    """The convolutions and linear layers that a call makes, one after another, on inputs that are there already."""
    met: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda layer, args: met.append((layer, args[0].detach().clone())))
        for module in net.modules()
        if isinstance(module, kinds)
    ]
    call()
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def alone() -> None:
        for layer, x in met:
            layer(x)

    return alone
