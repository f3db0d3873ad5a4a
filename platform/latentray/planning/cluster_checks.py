"""The cluster: whether it answers, what it has, and each of its nodes, asked by an actor that is pinned to it.

Ray waits long for what does not answer, and cannot be interrupted: all of it runs in a process of its own that is killed
when its time is up, and hands findings over as they come.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from latentray.config.doctor import DoctorConfig
from latentray.planning import all_reduce, machine, machine_checks, storage_checks
from latentray.planning.findings import Finding, first_line, guarded

NAME = "cluster"
_START_S = 60.0
"""For a cluster that is started here, and for what is asked of one that answered."""
_ASK_S = 60.0
_CLOCK_TRIES = 5
_MOST_SKEW_S = 1.0
_CONNECTED = "connected"
_MEND = (
    "Give the address of the cluster's head (host:6379; ray://host:10001 from outside), or start one: ray start --head. "
    "With token authentication set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
)


def check(config: DoctorConfig) -> Iterator[Finding]:
    """Findings of the cluster at `cluster.address`, or of one started on this machine, as they come."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    unreachable = None if address is None else unreachable_because(address)
    if unreachable:
        yield Finding.failed(NAME, f"{address} does not answer: {unreachable}", _MEND)
        return
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(theirs, config, address), daemon=True)
    process.start()
    theirs.close()
    try:
        limit = config.timeout_s if address else _START_S
        until = time.monotonic() + limit
        while True:
            if not mine.poll(max(until - time.monotonic(), 0)):
                who = address or "a cluster started here"
                yield Finding.failed(NAME, f"{who} gives no answer within {limit:.0f} s", _MEND)
                return
            got = mine.recv()
            if got is None:
                return
            limit = 2 * _ASK_S
            until = time.monotonic() + limit
            if got != _CONNECTED:
                yield got
    except EOFError:
        yield Finding.failed(NAME, "the process that asks the cluster died", _MEND)
    finally:
        process.kill()


def unreachable_because(address: str, timeout_s: float = 3.0) -> str:
    """Why no TCP connection is made to host:port or ray://host:port; empty where one is, or for `auto` and `local`."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    return machine.connect_error(host, port, timeout_s) if colon else ""


def _examine(pipe: Connection, config: DoctorConfig, address: str | None) -> None:
    """The child process: connect, then one check after another."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what Ray prints is not the doctor's answer
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # one line a second while nobody answers
    try:
        _connect(address)
    except Exception as error:
        pipe.send(Finding.failed(NAME, f"{address or 'a local cluster'}: {first_line(error)}", _MEND))
        pipe.send(None)
        return
    pipe.send(_CONNECTED)
    for found in examine(config, remote=address is not None):
        pipe.send(found)
    pipe.send(None)
    import ray

    ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    source = Path(__file__).resolve().parents[1]
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
    if address is not None:  # nodes may hold no copy of this package, or an older one
        ray.init(address=address, runtime_env={"py_modules": [str(source)]}, **quiet)
        return
    paths = [str(source.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    ray.init(include_dashboard=False, object_store_memory=128 << 20, runtime_env=env, **quiet)


def examine(config: DoctorConfig, *, remote: bool) -> Iterator[Finding]:
    """Findings of the cluster that this process is connected to.

    Args:
        remote: its nodes are not this machine alone: they are examined like it, and compared with it.
    """
    import ray

    nodes = ray.nodes()
    alive = {_label(node, nodes): node for node in nodes if node["Alive"]}
    yield from resources(len(alive), len(nodes) - len(alive), ray.cluster_resources(), config.cluster.workers)
    probes = {label: _pinned(_Probe, node).remote() for label, node in alive.items()}
    facts, silent = _ask(probes, "facts")
    yield from silent
    probes = {label: probes[label] for label in facts}
    if not probes:
        return
    if remote:
        yield machine_checks.agreeing({"here": machine.facts(), **facts})
        for one in machine_checks.check(facts, min_free_gb=config.min_free_gb):
            yield dataclasses.replace(one, name=f"nodes: {one.name}")
    yield from guarded("clocks", lambda: [skew({label: _offset(probe) for label, probe in probes.items()})])
    doers = {label: partial(_do, probe) for label, probe in probes.items()}
    yield from guarded(storage_checks.NAME, lambda: storage_checks.check(config.storage, doers))
    yield from guarded(all_reduce.NAME, lambda: _all_reduce({label: alive[label] for label in probes}))


def resources(alive: int, dead: int, has: Mapping[str, float], workers: int) -> list[Finding]:
    """What the cluster has, and whether `cluster.workers` fit."""
    shown = f"{alive} node{'s' if alive > 1 else ''}, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
    memory = has.get("memory", 0) / 2**30
    shown += f", {memory:,.0f} GiB of memory"
    found = []
    most = max(has.get("GPU", 0), has.get("CPU", 0))
    if workers > most:
        found.append(
            Finding.failed(
                NAME, f"{shown}: too little for cluster.workers={workers}", "Lower cluster.workers, or add nodes."
            )
        )
    else:
        found.append(Finding.ok(NAME, shown))
    if dead:
        found.append(
            Finding.warning("dead nodes", f"{dead} left the cluster", "See why in the dashboard, or with `ray status`.")
        )
    return found


def skew(offsets: Mapping[str, tuple[float, float]]) -> Finding:
    """Clocks beside this machine's: node -> seconds ahead, and how far that may be off."""
    worst = max(offsets, key=lambda node: abs(offsets[node][0]) - offsets[node][1])
    ahead, unsure = offsets[worst]
    shown = f"{worst} is {ahead:+.3f} s (± {unsure:.3f}) beside this machine, the farthest of {len(offsets)}"
    if abs(ahead) - unsure > _MOST_SKEW_S:
        return Finding.failed("clocks", shown, "Run NTP on every node (chrony, systemd-timesyncd).")
    return Finding.ok("clocks", shown)


class _Probe:
    """Answers for its node. Imports are late: the class travels, and what it imports is found over there."""

    def facts(self) -> dict[str, Any]:
        from latentray.planning import machine

        return machine.facts()

    def now(self) -> float:
        return time.time()

    def do(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def address(self) -> str:
        import ray

        return f"{ray.util.get_node_ip_address()}:{machine.free_port()}"

    def join(self, *place: Any) -> float:
        from latentray.planning import all_reduce

        return all_reduce.join(*place)


def _pinned(kind: type, node: Mapping[str, Any], *, gpus: int = 0) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, num_gpus=gpus, scheduling_strategy=strategy)(kind)


def _label(node: Mapping[str, Any], nodes: list[dict[str, Any]]) -> str:
    """The node's address, with a part of its id where several share one."""
    address = node["NodeManagerAddress"]
    shared = sum(one["NodeManagerAddress"] == address for one in nodes) > 1
    return f"{address}/{node['NodeID'][:6]}" if shared else address


def _ask(probes: Mapping[str, Any], method: str) -> tuple[dict[str, Any], list[Finding]]:
    """Every node's answer, and a finding for each that gives none."""
    import ray

    asked = {label: getattr(probe, method).remote() for label, probe in probes.items()}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ASK_S)
    answers, silent = {}, []
    for label, reference in asked.items():
        try:
            answers[label] = ray.get(reference, timeout=0.1)
        except Exception as error:
            mend = "Look at the node with `ray status` and at its raylet.err; `ray stop` it if it hangs."
            silent.append(Finding.failed(f"node {label}", first_line(error), mend))
    return answers, silent


def _offset(probe: Any) -> tuple[float, float]:
    """Cristian's algorithm (1989): of several questions the one answered fastest; half its time bounds the error."""
    import ray

    best = (0.0, float("inf"))
    for _ in range(_CLOCK_TRIES):
        asked = time.time()
        there = ray.get(probe.now.remote(), timeout=_ASK_S)
        answered = time.time()
        half = (answered - asked) / 2
        if half < best[1]:
            best = (there - asked - half, half)
    return best


def _do(probe: Any, function: Callable[..., Any], *args: Any) -> Any:
    import ray

    try:
        return ray.get(probe.do.remote(function, *args), timeout=_ASK_S)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None


def _all_reduce(nodes: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """A process for every GPU; without two of them one for each node, two on a single one."""
    import ray

    places = [(label, node) for label, node in nodes.items() for _ in range(int(node["Resources"].get("GPU", 0)))]
    backend = "nccl" if len(places) >= 2 else "gloo"
    if backend == "gloo":
        places = list(nodes.items()) * (2 if len(nodes) == 1 else 1)
    elif ray.available_resources().get("GPU", 0) < len(places):
        mend = "Run the doctor again when they are free."
        return [Finding.warning(all_reduce.NAME, f"not tried: some of the {len(places)} GPUs are taken", mend)]
    gpus = 1 if backend == "nccl" else 0
    ranks = [_pinned(_Probe, node, gpus=gpus).remote() for _, node in places]
    world, device = len(ranks), 0 if gpus else None
    try:
        address = ray.get(ranks[0].address.remote(), timeout=_ASK_S)
        joined = [one.join.remote(rank, world, address, backend, device) for rank, one in enumerate(ranks)]
        spent = max(ray.get(joined, timeout=all_reduce.LIMIT_S))
    except Exception as error:
        return [all_reduce.failed(backend, world, first_line(getattr(error, "cause", None) or error))]
    finally:
        for one in ranks:
            ray.kill(one)
    where = f"on {len(nodes)} nodes" if len(nodes) > 1 else "of one node"
    return [all_reduce.told(world, backend, spent, where)]
