"""Facts of the machine that runs this: one call here or in a Ray actor on a node. Judging them is `machine_checks`' part.

Only the standard library is imported, so that it tells of a node on which nothing else is installed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "webdataset", "pyarrow", "numpy", "safetensors")
_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,memory.free",
    "--format=csv,noheader,nounits",
)


def facts(cache: str | None = None) -> dict[str, Any]:
    """Everything the doctor asks of a machine, as plain values.

    Args:
        cache: folder of cached remote files; None for the node's own setting.
    """
    cached = cache or os.environ.get("LATENTRAY_CACHE") or str(_default_cache())
    return {
        "versions": versions(),
        "gpus": gpus(),
        "open_files": list(resource.getrlimit(resource.RLIMIT_NOFILE)),
        "shared_memory": disk("/dev/shm"),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disks": {"cache": disk(cached), "temporary files": disk(tempfile.gettempdir())},
        "cache": {"path": cached, "error": write_error(cached)},
        "byte_code_off": bool(os.environ.get("PYTHONDONTWRITEBYTECODE")),
        "byte_code_folder": os.environ.get("PYTHONPYCACHEPREFIX", ""),
    }


def versions() -> dict[str, str]:
    """Python's and the packages' versions, `missing` where one is not installed; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def gpus() -> dict[str, Any]:
    """What the driver lists, and how many of them torch can use: `{"devices": [...], "usable": n, "torch_cuda": ...}`."""
    devices: list[dict[str, Any]] = []
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=True)
        for line in done.stdout.splitlines():
            name, driver, total, free = (part.strip() for part in line.split(","))
            devices.append({"name": name, "driver": driver, "total": int(total) << 20, "free": int(free) << 20})
    usable, built_for = 0, None
    if devices and importlib.util.find_spec("torch"):
        import torch

        usable, built_for = torch.cuda.device_count(), torch.version.cuda
    return {"devices": devices, "usable": usable, "torch_cuda": built_for}


def disk(path: str) -> dict[str, Any]:
    """Bytes in all and free where a path lies, or would lie."""
    folder = Path(path).absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return {"path": path, "total": usage.total, "free": usage.free}


def write_error(folder: str) -> str:
    """Write and remove a file in a folder, which is made where it is not there; what went wrong, or nothing."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".doctor-{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"doctor")
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def port_error(port: int, host: str = "") -> str:
    """Why nothing can listen on a port; empty where something can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return ""


def connect_error(host: str, port: int | str, timeout_s: float) -> str:
    """Why no TCP connection is made; empty where one is."""
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def free_port() -> int:
    """A port nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def now() -> float:
    """This machine's clock, in seconds."""
    return time.time()


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentray"
