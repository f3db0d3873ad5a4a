"""Whether processes reach each other as training's do: they form a process group and sum a tensor over it."""

from __future__ import annotations

import datetime
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

from latentray.planning import machine
from latentray.planning.findings import Finding

NAME = "all-reduce"
NUMEL = 1 << 20
LIMIT_S = 60.0
_MEND = (
    "Open TCP ports between the nodes; where a machine has several networks, name the right one in NCCL_SOCKET_IFNAME "
    "(GLOO_SOCKET_IFNAME on CPUs). NCCL_DEBUG=INFO tells more."
)


def join(rank: int, world: int, address: str, backend: str, device: int | None) -> float:
    """One process' part; seconds of the second all-reduce, of 4 MiB. Raises RuntimeError for a wrong sum or a lost process.

    Args:
        address: host:port of rank 0.
        device: number of the GPU; None for the CPU.
    """
    import torch
    import torch.distributed as dist

    where = torch.device("cpu") if device is None else torch.device("cuda", device)
    if device is not None:
        torch.cuda.set_device(where)
    limit = datetime.timedelta(seconds=LIMIT_S / 2)
    dist.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=limit)
    try:
        spent = 0.0
        for _ in range(2):
            tensor = torch.full((NUMEL,), float(rank + 1), device=where)
            began = time.perf_counter()
            dist.all_reduce(tensor)
            total = float(tensor[-1])  # waits for the GPU
            spent = time.perf_counter() - began
        if total != world * (world + 1) / 2:
            raise RuntimeError(f"the sum over {world} processes is {total}")
        return spent
    finally:
        dist.destroy_process_group()


def told(world: int, backend: str, spent: float, where: str) -> Finding:
    """The finding of processes that all ended well."""
    rate = 2 * (world - 1) / world * 4 * NUMEL / max(spent, 1e-9) / 1e9
    return Finding.ok(NAME, f"{backend} over {world} processes {where}: 4 MiB at {rate:.1f} GB/s (bus)")


def failed(backend: str, world: int, error: str) -> Finding:
    return Finding.failed(NAME, f"{backend} over {world} processes: {error}", _MEND)


def here(gpus: int) -> list[Finding]:
    """Between processes of this machine: one per GPU where there are two, else two on the CPU."""
    world, backend = (gpus, "nccl") if gpus >= 2 else (2, "gloo")
    context = multiprocessing.get_context("spawn")  # forked processes cannot use CUDA
    address = f"127.0.0.1:{machine.free_port()}"
    pipes, processes = [], []
    for rank in range(world):
        mine, theirs = context.Pipe(duplex=False)
        place = (rank, world, address, backend, rank if backend == "nccl" else None)
        processes.append(context.Process(target=_report, args=(theirs, *place), daemon=True))
        pipes.append(mine)
    for process in processes:
        process.start()
    until = time.monotonic() + LIMIT_S
    try:
        found = [_receive(pipe, until) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
    wrong = [one for one in found if isinstance(one, str)]
    if wrong:
        return [failed(backend, world, wrong[0])]
    return [told(world, backend, max(found), "of this machine")]


def _report(pipe: Connection, *place: Any) -> None:
    try:
        pipe.send(join(*place))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _receive(pipe: Connection, until: float) -> Any:
    if not pipe.poll(max(until - time.monotonic(), 0)):
        return f"no answer within {LIMIT_S:.0f} s"
    try:
        return pipe.recv()
    except EOFError:
        return "a process died"
