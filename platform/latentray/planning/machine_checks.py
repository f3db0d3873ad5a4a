"""Whether machines are fit: pure functions from the facts of `machine` to findings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from latentray.planning.findings import Finding, over_nodes

Facts = Mapping[str, Any]
_MUST_AGREE = ("python", "ray", "torch", "deepspeed", "transformers")
"""Where these differ between nodes, workers fail to start, or compute different numbers."""
_NEEDED_TO_TRAIN = ("torch", "deepspeed", "webdataset")
_FULL = 0.95
"""Ray spills no objects to a disk that is fuller, and its tasks hang."""
_FILES_WANTED, _FILES_LEAST = 65_536, 4_096
_GIB = 1 << 30


def check(facts: Mapping[str, Facts], *, min_free_gb: float) -> list[Finding]:
    """The checks of each machine by itself, name -> facts; `agreeing` compares them."""
    found: list[Finding] = []
    each: tuple[Callable[[Facts], Finding], ...] = (
        packages,
        gpus,
        lambda one: disks(one, min_free_gb=min_free_gb),
        shared_memory,
        open_files,
        cache,
        byte_code,
    )
    for one in each:
        found += over_nodes(one, facts)
    return found


def agreeing(facts: Mapping[str, Facts]) -> Finding:
    """The same versions everywhere; what differs is named with its nodes."""
    name = "versions agree"
    differing: dict[str, dict[str, list[str]]] = {}
    for node, one in facts.items():
        for package, version in one["versions"].items():
            differing.setdefault(package, {}).setdefault(version, []).append(node)
    differing = {package: found for package, found in differing.items() if len(found) > 1}
    if not differing:
        return Finding.ok(name, f"on {len(facts)} machine{'s' if len(facts) > 1 else ''}")
    what = "; ".join(
        f"{package}: " + ", ".join(f"{version} on {' '.join(nodes)}" for version, nodes in found.items())
        for package, found in differing.items()
    )
    mend = "Install one set of versions everywhere: the same image, or pip install -c constraints.txt."
    fatal = any(package in _MUST_AGREE for package in differing)
    return Finding.failed(name, what, mend) if fatal else Finding.warning(name, what, mend)


def packages(facts: Facts) -> Finding:
    """What training imports is installed."""
    versions = facts["versions"]
    missing = [package for package in _NEEDED_TO_TRAIN if versions[package] == "missing"]
    shown = ", ".join(f"{package} {version}" for package, version in versions.items() if version != "missing")
    if missing:
        return Finding.warning(
            "packages", f"{', '.join(missing)} missing; {shown}", "Training wants them: pip install 'latentray[train]'."
        )
    return Finding.ok("packages", shown)


def gpus(facts: Facts) -> Finding:
    """What the driver lists torch can use, and its memory is free."""
    found, name = facts["gpus"], "GPUs"
    devices = found["devices"]
    if not devices:
        return Finding.ok(name, "none: this runs on CPUs")
    first = devices[0]
    shown = f"{len(devices)} x {first['name']}, driver {first['driver']}"
    if found["usable"] < len(devices):
        built = f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "CPUs only"
        return Finding.failed(
            name,
            f"{shown}, of which torch (built for {built}) can use {found['usable']}",
            "Install a torch build for the driver's CUDA version, and look at CUDA_VISIBLE_DEVICES.",
        )
    busy = [place for place, one in enumerate(devices) if one["free"] < 0.9 * one["total"]]
    if busy:
        least = min(one["free"] for one in devices) / _GIB
        return Finding.warning(
            name,
            f"{shown}; memory of {', '.join(map(str, busy))} is in use ({least:.1f} GiB free at the least)",
            "See who holds it with nvidia-smi, and end what is left over.",
        )
    return Finding.ok(name, f"{shown}, {first['free'] / _GIB:.0f} GiB free each")


def disks(facts: Facts, *, min_free_gb: float) -> Finding:
    """Room for caches and spilled objects."""
    name = "disk space"
    for label, one in facts["disks"].items():
        used = 1 - one["free"] / max(one["total"], 1)
        if used > _FULL:
            return Finding.failed(
                name,
                f"the disk of {label} ({one['path']}) is {used:.0%} full",
                "Free some space: Ray spills nothing to a disk that is 95 % full.",
            )
        if one["free"] < min_free_gb * 1e9:
            return Finding.warning(
                name,
                f"{one['free'] / 1e9:.1f} GB free for {label} ({one['path']})",
                "Free some space, or set LATENTRAY_CACHE and RAY_TMPDIR to a larger disk.",
            )
    shown = ", ".join(f"{one['free'] / 1e9:,.0f} GB for {label}" for label, one in facts["disks"].items())
    return Finding.ok(name, f"free: {shown}")


def shared_memory(facts: Facts) -> Finding:
    """Ray's object store takes 30 % of the memory from /dev/shm; loader processes hand batches over through it."""
    name, total = "shared memory", facts["shared_memory"]["total"]
    wanted = 0.3 * facts["memory"]
    shown = f"/dev/shm holds {total / _GIB:.1f} GiB"
    if total < wanted:
        return Finding.warning(
            name,
            f"{shown}, and Ray's object store wants {wanted / _GIB:.1f} GiB: it would work on disk, slowly",
            f"Start the container with --shm-size={wanted / _GIB:.0f}g, or mount an emptyDir of medium Memory there.",
        )
    return Finding.ok(name, shown)


def open_files(facts: Facts) -> Finding:
    """Ray opens a file per connection."""
    name, (soft, hard) = "open files", facts["open_files"]
    most = float("inf") if hard < 0 else hard
    mend = "Raise it: ulimit -n 65536 before `ray start`, or LimitNOFILE of the service, or --ulimit nofile of the container."
    if most < _FILES_LEAST:
        return Finding.failed(name, f"at most {hard:,} may be open", mend)
    if most < _FILES_WANTED:
        return Finding.warning(name, f"at most {hard:,} may be open", mend)
    return Finding.ok(name, f"{soft:,} may be open")


def cache(facts: Facts) -> Finding:
    """Remote files are read through a folder of the node."""
    found, name = facts["cache"], "cache"
    if found["error"]:
        return Finding.failed(
            name, f"{found['path']} cannot be written: {found['error']}", "Set LATENTRAY_CACHE to a folder that can."
        )
    return Finding.ok(name, found["path"])


def byte_code(facts: Facts) -> Finding:
    """Without byte code every process compiles its imports anew."""
    name = "byte code"
    if facts["byte_code_off"]:
        return Finding.warning(
            name,
            "PYTHONDONTWRITEBYTECODE is set: each process starts some ten seconds later",
            "Unset it; PYTHONPYCACHEPREFIX=<folder> keeps byte code out of the source tree.",
        )
    where = f" in {facts['byte_code_folder']}" if facts["byte_code_folder"] else ""
    return Finding.ok(name, f"is kept{where}")
