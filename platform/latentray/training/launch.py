"""A run from its configuration to its result. Everything that can be refused is refused before a worker starts."""

from __future__ import annotations

import datetime
import os
import secrets
import shlex
import sys

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.train import Train
from latentray.errors import Interrupted, Stopped
from latentray.interchange import resolving
from latentray.training import here, on_ray, preflight, report, telemetry

RESULTS = {"autoencoder": "autoencoder", "diffusion": "model", "classifier": "classifier"}
"""The artifact each stage leaves in its run's folder."""
MODELS = {"autoencoder_from": "autoencoder", "denoiser_from": "model"}
"""The settings that name models, and what each has to be."""


def train(config: Train) -> str:
    """Train to the end and return the URI of the result; continue where `run` names an unfinished run.

    Raises before any worker starts: InputMissing, DigestMismatch or FingerprintMismatch for data or a run that cannot be
    used, ConfigError for settings that contradict each other, EnvironmentRefused for a full disk or W&B without a key.
    Raises Stopped where it was asked to stop, Interrupted by Ctrl-C; TrainingFailed where the workers died more often than
    allowed.
    """
    run = config.run or new_run_id(config.stage.name)
    out = store.absolute(config.out or store.join("runs", run))
    result = store.join(out, RESULTS[config.stage.name])
    store.require_reachable(out)
    finished = manifest.find(result)
    if finished is not None:
        print(f"{run} is finished: {result}", flush=True)
        return result
    found = resolving.resolved(config, MODELS, beside=out)
    inputs = preflight.check(found, out)
    config = resolving.kept(found, MODELS, of=config, beside=out)
    print(f"run {run} -> {out}")
    print(f"resume it with: {resume_command(run, out)}", flush=True)
    train_there = {"none": here.train, "ray": on_ray.train}[config.cluster.kind]
    leads = int(os.environ.get("RANK", "0")) == 0
    state = "failed"
    try:
        state = "finished" if train_there(config, run, out) else "stopped"
        if state == "finished" and leads:
            _seal_run(config, run, out, result, inputs)
    except KeyboardInterrupt:
        state = "stopped"
        raise Interrupted("The run was interrupted.", where=out, mend=resume_command(run, out)) from None
    finally:
        if leads and store.exists(store.join(out, telemetry.RUN)):  # a worker began
            _report(run, out, state)
    if state == "stopped":
        raise Stopped("The run was stopped, as asked.", where=out, mend=resume_command(run, out))
    return result


def _report(run: str, out: str, state: str) -> None:
    try:
        report.write(out, state, resume=resume_command(run, out))
    except OSError as error:  # of a full disk, say: it must not hide what ended the run
        print(f"report.html could not be written: {error}", flush=True)


def new_run_id(stage: str) -> str:
    """`<stage>-<date>-<time>-<four random hex digits>`."""
    return f"{stage}-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def resume_command(run: str, out: str) -> str:
    """The command of this process, with the run's identity in it."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    if module is None or not module.name.startswith("jobs.train"):
        return f"python -m jobs.train run={run} out={out} ... (with the same settings)"
    kept = [a for a in sys.argv[1:] if not a.startswith(("run=", "out="))]
    return f"{_launcher()} -m jobs.train {shlex.join([*kept, f'run={run}', f'out={out}'])}"


def _launcher() -> str:
    """What starts this process's module: torchrun, where it did, with as many processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return "python"
    here, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    nodes = f"--nnodes {world // here} " if world > here else ""
    return f"torchrun {nodes}--nproc-per-node {here}"


def _seal_run(config: Train, run: str, out: str, result: str, inputs: dict[str, str]) -> None:
    """The run's own manifest: what it was made from, with which settings, and what it made."""
    made = manifest.read(result)
    manifest.refuse_existing(out, replace=True)
    meta = {"run": run, "result": {"kind": made.kind, "uri": result, "digest": made.digest}, "facts": made.meta}
    manifest.seal(out, {}, kind="run", inputs=inputs, config=compose.to_dict(config), meta=meta)
    print(f"Result: {result}")
    print(f"Next: {report.next_command(made.kind, result, compose.to_dict(config))}", flush=True)
