"""`python -m jobs.doctor`: every check, side by side, each with a limit of time; a table or JSON at the end."""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console

from latentray.config.doctor import DoctorConfig
from latentray.planning import (
    all_reduce,
    cluster_checks,
    findings,
    machine,
    machine_checks,
    service_checks,
    storage_checks,
)
from latentray.planning.findings import Finding, first_line

Check = Callable[[], Iterable[Finding]]
_HERE = "here"
_LIMIT_S = 30.0
_CLUSTER_LIMIT_S = 300.0


def run(config: DoctorConfig) -> list[Finding]:
    """Check, print, and return the findings."""
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    found = examine(config, tell=lambda text: err.print(text, markup=False))
    if config.json:
        print(json.dumps(to_json(found), indent=2), flush=True)
    else:
        findings.show(found, out)
    return found


def to_json(found: Iterable[Finding]) -> dict[str, Any]:
    found = list(found)
    return {"status": findings.worst(found), "findings": [dataclasses.asdict(one) for one in found]}


def examine(config: DoctorConfig, *, tell: Callable[[str], Any] = lambda text: None) -> list[Finding]:
    """Every finding, in the order of the checks. `tell` gets a line for each check that ends."""
    wanted = checks(config)
    found: dict[str, list[Finding]] = {name: [] for name, _, _ in wanted}
    ended: queue.Queue[tuple[str, list[Finding]]] = queue.Queue()
    begun = time.monotonic()
    for name, _, check in wanted:
        # Daemons: one that hangs in a foreign library keeps neither the others nor the end of the process.
        threading.Thread(target=_into, args=(ended, name, check), daemon=True).start()
    limits = {name: begun + limit for name, limit, _ in wanted}
    while limits:
        try:
            name, got = ended.get(timeout=max(min(limits.values()) - time.monotonic(), 0.001))
        except queue.Empty:
            for name in [name for name, until in limits.items() if until <= time.monotonic()]:
                del limits[name]
                spent = time.monotonic() - begun
                found[name] = [
                    Finding.failed(name, f"no answer within {spent:.0f} s", "Mend what hangs, and run it again.")
                ]
                tell(f"{name}: {findings.FAILED}")
            continue
        if name in limits:
            del limits[name]
            found[name] = got
            tell(f"{name}: {findings.worst(got)}")
    return [one for name, _, _ in wanted for one in found[name]]


def checks(config: DoctorConfig) -> list[tuple[str, float, Check]]:
    """Name, limit in seconds, and call of each check that the settings ask for."""
    alone = config.cluster.kind == "none"
    wanted: list[tuple[str, float, Check]] = [
        (
            "this machine",
            _LIMIT_S,
            lambda: machine_checks.check({_HERE: machine.facts()}, min_free_gb=config.min_free_gb),
        ),
        ("ports", _LIMIT_S, lambda: service_checks.ports(config.serve_port, config.dashboard_port)),
        ("W&B", 2 * service_checks.ANSWER_S, lambda: service_checks.tracking(config.tracking)),
    ]
    if config.hub:
        wanted.append(("model hub", 2 * service_checks.ANSWER_S, service_checks.hub))
    if alone:
        wanted.append(("storage", _LIMIT_S, lambda: storage_checks.check(config.storage, {_HERE: storage_checks.here})))
        wanted.append(("all-reduce", all_reduce.LIMIT_S + 10, lambda: all_reduce.here(machine.gpus()["usable"])))
    else:
        wanted.append(("cluster", _CLUSTER_LIMIT_S, lambda: cluster_checks.check(config)))
    return wanted


def _into(ended: queue.Queue[tuple[str, list[Finding]]], name: str, check: Check) -> None:
    """Run a check in its thread. Findings before an error count too."""
    found: list[Finding] = []
    try:
        found += findings.guarded(name, lambda: list(check()))
    except BaseException as error:
        found.append(Finding.failed(name, first_line(error), "Run it again."))
    ended.put((name, found))
