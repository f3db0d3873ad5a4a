"""Training in Ray Train workers: how many, on what, how often they are started again, and what comes back from them.

Ray starts workers and starts them again; where a run goes on, our own manifests say, never Ray's snapshot. So each launch
has a fresh name there, and a run cannot be resumed by accident, nor lost with a truncated snapshot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from latentray import errors
from latentray.checkpoint import store
from latentray.config import compose
from latentray.config.command import known_cause
from latentray.config.train import Train
from latentray.errors import ConfigError, LatentrayError, TrainingFailed
from latentray.reporting.progress import Progress, is_terminal
from latentray.training import board as board_module
from latentray.training import stopping
from latentray.training.board import Board, Told
from latentray.training.loop import Hooks
from latentray.training.worker import device_of, work

_PLACED_WITHIN, _PLACED_WITHIN_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20"
"""Ray counts nodes every 20 s, so it may place workers on one that has just died, and waits a minute for it by default. Where
a run goes on with fewer, it only places workers on nodes that it saw: what is not placed at once never is."""
_FOLDER = "ray"
"""Below the run's: what Ray Train keeps while a launch lasts."""
_ANSWER_S = 10.0


def train(config: Train, run: str, out: str) -> bool:
    """Train to the end; False where it was asked to stop.

    Raises what a worker raised on purpose (it is not tried again), and TrainingFailed where workers died more often than
    `cluster.max_failures` allows.
    """
    import ray
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from latentray.data import cluster

    cluster.connect(config.cluster.address)
    has = ray.cluster_resources()
    use_gpu = wants_gpus(config, has.get("GPU", 0))
    require_cpus(config, has.get("CPU", 0), grows=bool(config.cluster.address or os.environ.get("RAY_ADDRESS")))
    stopping.clear(out)
    launch = secrets.token_hex(3)
    folder = store.join(out, _FOLDER)
    filesystem, path = store.filesystem(folder)
    most, fewest = config.cluster.workers, config.cluster.min_workers
    if fewest is not None:
        os.environ.setdefault(_PLACED_WITHIN, _PLACED_WITHIN_S)
    board = _board()
    trainer = TorchTrainer(
        functools.partial(_work, config=compose.to_dict(_absolute(config)), run=run, out=out, board=board),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(config.cluster.collective_timeout_s)
        ),
        scaling_config=ScalingConfig(
            num_workers=most if fewest is None else (fewest, most),
            elastic_resize_monitor_interval_s=config.cluster.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{run}-{launch}",
            storage_path=path,
            storage_filesystem=filesystem,
            # A node that is taken back is nobody's fault: it has a budget of its own, without an end.
            failure_config=FailureConfig(max_failures=config.cluster.max_failures, max_preemption_failures=-1),
        ),
    )
    try:
        with stopping.handed_on(out, lambda: _asked(board.idle_s.remote())) as asked, _drawn(board):
            _fit(trainer)
    except ray.train.TrainingFailedError as error:
        own = _raised(board) or known_cause(error)
        if own is not None:
            raise own from None
        raise TrainingFailed(
            f"Training failed after {config.cluster.max_failures} restarts: {str(error).splitlines()[-1]}",
            where=out,
            mend=f"See the workers' output above, mend the cause and resume with run={run}.",
        ) from error
    own = _raised(board)
    if own is not None:
        raise own
    with contextlib.suppress(OSError):  # of a store that is out: how the run ended is known
        store.delete(folder)
    return not (asked.is_set() or stopping.requested(out))


def _fit(trainer: Any) -> None:
    """`trainer.fit()`, where Ctrl-C is a KeyboardInterrupt: Ray takes it for itself, ends the workers and exits with code 1."""
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _board() -> Any:
    """A board on the driver's own node: the others may go."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    made: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board)
    return made.remote(drawn=is_terminal(sys.stdout))


def _asked(reference: Any, otherwise: Any = None) -> Any:
    """What a board answers; where it does not, since the cluster is busy or gone, what is said of it otherwise."""
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(reference, timeout=_ANSWER_S)
    return otherwise


def wants_gpus(config: Train, has: float) -> bool:
    """Whether each worker takes a GPU. Raises ConfigError where the cluster has some, but too few: to train on its CPUs
    instead is never what was meant."""
    wanted = config.cluster.min_workers or config.cluster.workers
    taken = config.cluster.device == "cuda" or (config.cluster.device == "auto" and has > 0)
    if taken and has < wanted:
        raise ConfigError(
            f"{wanted} workers want a GPU each; the cluster has {has:g}.",
            where="cluster.workers",
            mend="Lower cluster.workers, or set cluster.device=cpu.",
        )
    return taken


def require_cpus(config: Train, has: float, *, grows: bool) -> None:
    """Raise ConfigError for more workers than the CPUs of a cluster that never `grows`: Ray would wait for them for ever."""
    wanted = (config.cluster.min_workers or config.cluster.workers) * config.cluster.cpus_per_worker
    if wanted <= has:
        return
    if not grows:
        raise ConfigError(
            f"The workers want {wanted:g} CPUs; this machine has {has:g}.",
            where="cluster.workers",
            mend="Lower cluster.workers or cluster.cpus_per_worker, or give cluster.address=<a larger cluster>.",
        )
    print(f"waiting for nodes: the workers want {wanted:g} CPUs, and the cluster has {has:g}", flush=True)


@contextlib.contextmanager
def _drawn(board: Any) -> Iterator[None]:
    """What rank 0 tells the board is drawn meanwhile, where standard output is a terminal."""
    if not is_terminal(sys.stdout):
        yield
        return

    over = threading.Event()
    thread = threading.Thread(
        target=board_module.draw, args=(lambda: _asked(board.said.remote()), over), name="progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _absolute(config: Train) -> Train:
    """The same configuration with absolute inputs: workers start in a folder of their own."""
    changed: dict[str, Any] = {
        key: store.absolute(value)
        for key in ("data", "latents", "autoencoder_from", "denoiser_from")
        if (value := getattr(config, key)) is not None
    }
    mixture = [dataclasses.replace(one, uri=store.absolute(one.uri)) for one in config.mixture.of]
    return dataclasses.replace(config, mixture=dataclasses.replace(config.mixture, of=mixture), **changed)


def _work(config: dict[str, Any], run: str, out: str, board: Any) -> None:
    """What each Ray Train worker runs: the very loop that torchrun runs."""
    import ray.train
    from ray.train.v2.api.config import RunConfig  # noqa: F401  (fails early where Train v1 is active)

    if _asked(board.failed.remote()) is not None:
        return  # another worker ended this launch on purpose; only its error is left to be told
    context = ray.train.get_context()
    rank = context.get_world_rank()
    hooks = Hooks(
        on_checkpoint=lambda uri, step: ray.train.report({"checkpoint": uri, "step": step}),
        leaving=_leaving,
        progress=functools.partial(Told, board.say.remote) if _asked(board.drawn.remote(), False) else Progress.begin,
    )
    sign = board_module.at_work(board.sign.remote) if rank == 0 else contextlib.nullcontext()
    try:
        with sign:
            finished = work(
                compose.from_dict(Train, config),
                run,
                out,
                rank=rank,
                world=context.get_world_size(),
                device=device_of("cuda" if torch.cuda.is_available() else "cpu", context.get_local_rank()),
                hooks=hooks,
            )
    except LatentrayError as error:
        _asked(board.fail.remote(_told(error)))
        raise
    if not finished and rank == 0:
        stopping.request(out)  # where the worker itself was asked, the driver hears it


def _leaving() -> frozenset[str]:
    """The nodes of this run that Ray knows will be taken back. Collective: Ray waits for all ranks."""
    import ray.train

    info = ray.train.get_preemption_info()
    return frozenset(info.preempted_node_ids if info is not None else ())


def _told(error: LatentrayError) -> dict[str, Any]:
    return {"type": type(error).__name__, "what": error.what, "where": error.where, "mend": error.mend}


def _raised(board: Any) -> LatentrayError | None:
    """The error that a worker of this launch raised on purpose."""
    told = _asked(board.failed.remote())
    if told is None:
        return None
    kind = getattr(errors, told["type"], TrainingFailed)
    return kind(told["what"], where=told["where"], mend=told["mend"])
