"""The page of a run, `<out>/report.html`, from what lies in its folder: so also for a run that was killed."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import Any

from PIL import Image

from latentray.checkpoint import manifest, store
from latentray.checkpoint.manifest import Manifest
from latentray.errors import LatentrayError
from latentray.planning import plan, plan_report
from latentray.reporting import curves
from latentray.tracking import jsonl
from latentray.training import checkpoint, run_figures, run_page, telemetry
from latentray.training.run_figures import Records

logger = logging.getLogger(__name__)

PAGE = "report.html"
RESULTS = ("autoencoder", "model", "classifier")
"""The artifacts that runs leave in their folders."""


def write(out: str, state: str, *, resume: str = "") -> str | None:
    """Write the page of the run at `out`, print the plan beside what it took, and return the page's URI.

    None where it could not be written: that is told and not raised, for the run's result, or the error that ended it,
    matters more. Call it on rank 0 or in the driver, after the tracker was closed; a later call replaces the page.

    Args:
        state: one of `run_page.STATES`. Raises ValueError for another.
        resume: the command that goes on with the run, where it is known.
    """
    if state not in run_page.STATES:
        raise ValueError(f"no state of a run: {state!r}")
    try:
        records = _records(out)
        about = describe(out, state, records, resume=resume)
        html = run_page.run_page(records, about, _pictures(out))
        uri = store.join(out, PAGE)
        store.write_bytes(uri, html.encode())
    except Exception as error:
        logger.warning("The run's page could not be written (%s: %s).", type(error).__name__, error)
        return None
    for one in about["plan"]:
        planned, taken = (run_page.quantity(one["name"], one[key]) for key in ("planned", "actual"))
        print(f"{one['name'].replace('_', ' ')}: {planned} planned, {taken} taken", flush=True)
    print(f"report: {uri}", flush=True)
    return uri


def describe(out: str, state: str, records: Records, *, resume: str = "") -> dict[str, Any]:
    """What a run's folder tells of it, as `run_page.run_page` takes it."""
    begun = _json(store.join(out, telemetry.RUN))
    results = {name: _manifest(store.join(out, name)) for name in RESULTS}
    kind, made = next(((name, one) for name, one in results.items() if one is not None), ("", None))
    saved = next(iter(checkpoint.candidates(out)), None)
    known = [one for one in (made, saved.manifest if saved else None) if one is not None]
    config = begun.get("config") or next((one.config for one in known), {})
    run, result = str(begun.get("run") or out.rstrip("/").rsplit("/", 1)[-1]), store.join(out, kind) if made else None
    notes = [f"Its newest checkpoint is {saved.uri}."] if saved and state != "finished" else []
    if made is not None and made.git_commit:
        notes.append(f"The result was made by commit {made.git_commit[:10]}.")
    return {
        "run": run,
        "stage": begun.get("stage") or (config.get("stage") or {}).get("name"),
        "state": state,
        "total_samples": config.get("total_samples"),
        "result": result,
        "lineage": _lineage(config, begun, known, made, result),
        "figures": dict((made.meta.get("figures") or {}) if made else {}),
        "plan": _plan(out, records, saved.manifest if saved else None, finished=state == "finished"),
        "commands": _commands(state, kind, result, config, resume or _resume(run, out), begins_anew=saved is None),
        "machine": {
            "workers": begun.get("workers", "unknown"),
            "device": begun.get("device", "unknown"),
            **(begun.get("facts") or {}),
        },
        "notes": notes,
        "config": config,
    }


_EVALUATED = {"video": "suite=clips data=...", "policy": "suite=policy"}
"""Family -> how its models are evaluated, where that is another suite than the standard one."""


def next_command(kind: str, result: str, config: Mapping[str, Any]) -> str:
    """The job that takes what a run made."""
    if kind == "autoencoder":
        mixed = (config.get("mixture") or {}).get("of") or [{}]
        data = config.get("data") or mixed[0].get("uri") or "..."
        return f"python -m jobs.precompute_latents data={data} autoencoder_from={result} out=..."
    if kind == "classifier":
        return f"python -m jobs.sample release=... classifier={result} label=0 classifier_scale=2.0"
    family = str((config.get("denoiser") or {}).get("family"))
    return f"python -m jobs.evaluate model={result} {_EVALUATED.get(family, 'data=...')}"


def _commands(
    state: str, kind: str, result: str | None, config: Mapping[str, Any], resume: str, *, begins_anew: bool
) -> list[dict[str, str]]:
    if state == "finished" and result is not None:
        return [{"title": "", "command": next_command(kind, result, config)}]
    title = "It left no checkpoint, and begins anew" if begins_anew else "It goes on from its newest checkpoint"
    return [{"title": title, "command": resume}]


def _resume(run: str, out: str) -> str:
    return f"python -m jobs.train run={run} out={out} ... (with the same settings)"


def _lineage(
    config: Mapping[str, Any],
    begun: Mapping[str, Any],
    known: list[Manifest],
    made: Manifest | None,
    result: str | None,
) -> list[dict[str, Any]]:
    """The run's inputs by role, and what it made of them: the artifact, or the run that did not come to its end."""
    inputs = next((one.inputs for one in known), None) or begun.get("inputs") or {}
    places = {
        "dataset": config.get("data"),
        "latents": config.get("latents"),
        "autoencoder": config.get("autoencoder_from"),
        "denoiser": config.get("denoiser_from"),
    }
    entries: list[dict[str, Any]] = [
        {"role": role, "kind": role.split(".", 1)[0], "digest": digest, "uri": places.get(role) or "", "inputs": {}}
        for role, digest in inputs.items()
    ]
    if made is not None:
        end = {"role": made.kind, "kind": made.kind, "digest": made.digest, "uri": result or ""}
    else:
        end = {"role": "unfinished run", "kind": "run", "digest": "", "uri": ""}
    return [*entries, end | {"inputs": dict(inputs)}]


def _plan(out: str, records: Records, saved: Manifest | None, *, finished: bool) -> list[dict[str, Any]]:
    """The comparisons with `<out>/plan.json`; none where nothing was planned."""
    planned = _json(store.join(out, plan_report.JSON))
    if not planned:
        return []
    taken = run_figures.actual(records, finished=finished)
    if saved is not None:
        taken["checkpoint_bytes"] = float(sum(entry.size for entry in saved.files.values()))
    return [{"name": one.name, "planned": one.planned, "actual": one.actual} for one in plan.beside(planned, taken)]


def _records(out: str) -> Records:
    where = store.join(out, telemetry.METRICS)
    return curves.parse(store.read_bytes(where).decode(errors="replace")) if store.exists(where) else []


def _pictures(out: str) -> dict[str, Image.Image]:
    """The newest of each picture that the run drew, by name."""
    folder = store.join(out, jsonl.PICTURES_FOLDER)
    newest = {name.rsplit("-", 1)[0]: name for name in store.list_files(folder) if name.endswith(".png")}
    found: dict[str, Image.Image] = {}
    for shown, name in newest.items():
        where = store.join(folder, name)
        try:
            found[shown] = Image.open(io.BytesIO(store.read_bytes(where))).convert("RGB")
        except (OSError, SyntaxError) as error:  # how Pillow says that a PNG is damaged
            logger.warning("Left out of the run's page: %s (%s)", where, error)
    return found


def _json(uri: str) -> dict[str, Any]:
    """The JSON object at a URI; empty where there is none, or no whole one."""
    if not store.exists(uri):
        return {}
    try:
        found = store.read_json(uri)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _manifest(uri: str) -> Manifest | None:
    try:
        return manifest.find(uri)
    except LatentrayError as error:
        logger.warning("Left out of the run's page: %s", error)
        return None
