"""Weights & Biases, kept off the training loop: a queue and one daemon thread.

The thread starts the W&B run, so a server that is dead or hangs delays nothing: after `start_seconds` the run is
recorded offline instead. `log` only enqueues. Where W&B loses something, `metrics.jsonl` still has it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import netrc
import os
import queue
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from latentray.config.tracking import TrackingConfig
from latentray.tracking import names, offline
from latentray.tracking.jsonl import METRICS_FILE

logger = logging.getLogger(__name__)

_QUEUE_SIZE = 100_000
_PROBE_SECONDS = 4.0
_DEFAULT_HOST = "https://api.wandb.ai"


def base_url() -> str:
    """The W&B server: `$WANDB_BASE_URL`, else the public one."""
    return (os.environ.get("WANDB_BASE_URL") or _DEFAULT_HOST).rstrip("/")


def api_key() -> str | None:
    """The key for `base_url()` from `$WANDB_API_KEY` or the netrc file (`$NETRC`, `~/.netrc`), as wandb takes it."""
    if key := os.environ.get("WANDB_API_KEY", "").strip():
        return key
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        found = netrc.netrc(path).authenticators(urlsplit(base_url()).netloc)
    except (OSError, netrc.NetrcParseError):
        return None
    return (found[2] or None) if found else None


def effective_mode(config: TrackingConfig) -> str:
    """`online`, `offline` or `disabled`: what `auto` comes to on this machine."""
    if config.mode != "auto":
        return config.mode
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in ("online", "offline", "disabled"):
        return wanted
    return "online" if api_key() else "offline"


def artifact_name(kind: str, digest: str) -> str:
    """The name that producer and consumer both derive, so that W&B joins them into one lineage."""
    return f"{kind}-{digest.removeprefix('sha256:')[:16]}"


class WandbTracker:
    """Sends a run to W&B from a thread of its own. See `tracker.Tracker` for the methods.

    A run that continues takes the same `run_id`: online W&B appends to it; offline each attempt leaves one folder,
    and `sync_command` names them all. Its history has every step once: an attempt leaves out the steps that W&B has
    already, and sends from `metrics.jsonl` those before `resumed_at` that an earlier attempt could not send any more.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_id: str,
        run_folder: Path,
        resolved_config: Mapping[str, Any],
        *,
        resumed_at: int | None = None,
    ) -> None:
        self._config, self._run_id, self._folder = config, run_id, Path(run_folder)
        self._resolved, self._resumed_at = dict(resolved_config), resumed_at or 0
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_QUEUE_SIZE)
        self._run: Any = None
        self._offline = False
        self._complete = False
        self._started = threading.Event()
        self._dropped = 0
        self._failures = 0
        self._step = 0
        self._known = -1
        with contextlib.suppress(Exception):  # here, not in the thread, where it would hold the interpreter's lock
            _wandb()  # against the first steps; what fails is reported by `_start`
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name="wandb-tracker", daemon=True)
        self._thread.start()

    def log(self, samples: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._put(lambda run: self._send(run, samples, values))

    def image(self, samples: int, name: str, picture: str | Path | np.ndarray, caption: str = "") -> None:
        from PIL import Image

        if isinstance(picture, np.ndarray):
            image = Image.fromarray(picture.copy())
        else:
            image = Image.open(picture)
            image.load()

        def send(run: Any) -> None:
            run.log({name: _wandb().Image(image, caption=caption or None)}, step=self._at(samples))

        self._put(send)

    def artifact(
        self, name: str, kind: str, uri: str, digest: str, inputs: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> None:
        given, about = dict(inputs), {**metadata, "name": name, "uri": uri, "digest": digest, "inputs": dict(inputs)}

        def send(run: Any) -> None:
            for role, input_digest in given.items():
                _use(run, _artifact(role.split(".", 1)[0], input_digest, {}), offline=self._offline)
            run.log_artifact(_artifact(kind, digest, about))

        self._put(send)

    def finish(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        deadline = time.monotonic() + self._config.finish_seconds
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=self._config.finish_seconds)
        thread.join(max(0.0, deadline - time.monotonic()))
        lost = self._dropped + self._failures
        if thread.is_alive() or not self._complete:
            logger.warning("W&B did not take everything in %g s; metrics.jsonl has it.", self._config.finish_seconds)
        elif lost:
            logger.warning("W&B missed %d records; metrics.jsonl has them.", lost)

    @property
    def sync_command(self) -> str | None:
        self._started.wait(timeout=2 * self._config.start_seconds)
        if self._run is None or (not self._offline and (self._thread is not None or self._complete)):
            return None
        folders = offline.folders(self._folder, self._run_id, offline=self._offline)
        asked = [] if self._offline else ["--no-skip-online"]  # else it passes over a run that began online
        return shlex.join(["wandb", "sync", *asked, "--id", self._run_id, *folders])

    def _put(self, send: Callable[[Any], None]) -> None:
        try:
            self._queue.put_nowait(send)
        except queue.Full:
            self._dropped += 1

    def _send(self, run: Any, samples: int, values: Mapping[str, float]) -> None:
        """Log a line, unless W&B has it from an earlier attempt. The export's line stands at the last step's samples."""
        is_step = names.TRAIN_SAMPLES_PER_SECOND in values or names.TRAIN_LOSS in values
        if samples > self._known or (samples == self._known and not is_step):
            run.log(dict(values), step=self._at(samples))

    def _catch_up(self) -> None:
        """Send the lines before `resumed_at` that W&B lacks: an earlier attempt's server, or its process, was gone."""
        path = self._folder / METRICS_FILE
        for line in path.read_text().splitlines() if self._resumed_at and path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, of the loop that is writing now
                record = json.loads(line)
                samples = int(record.pop("samples"))
                if self._known < samples <= self._resumed_at:
                    del record["time"]
                    self._send(self._run, samples, {name: float(value) for name, value in record.items()})

    def _at(self, samples: int) -> int:
        """W&B drops what goes back in step, and the picture of a validation may come after the next losses."""
        self._step = max(self._step, int(samples))
        return self._step

    def _work(self) -> None:
        try:
            self._start()
        except Exception as error:
            logger.warning("W&B could not be started (%s); metrics.jsonl has everything.", _first_line(error))
        finally:
            self._started.set()
        while (send := self._queue.get()) is not None:
            if self._run is None:
                continue
            try:
                send(self._run)
            except Exception as error:
                self._failures += 1
                if self._failures == 1:
                    logger.warning("W&B refused a record (%s); metrics.jsonl has it.", _first_line(error))
        if self._run is not None:
            try:
                self._run.finish()
                _wandb().teardown()  # only then is the file whole; Ray may kill the worker without its exit handlers
                self._complete = True
            except Exception as error:  # includes TimeoutError after `finish_seconds`
                logger.warning("W&B did not finish (%s).", _first_line(error))

    def _start(self) -> None:
        mode = effective_mode(self._config)
        recorded = offline.last_step(self._folder, self._run_id)
        if mode == "online" and (reason := unreachable(base_url(), api_key())):
            logger.warning("W&B at %s %s; this run is recorded offline.", base_url(), reason)
            mode = "offline"
        try:
            self._run = self._init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            logger.warning("W&B could not be reached (%s); this run is recorded offline.", _first_line(error))
            _wandb().teardown()  # its service holds the run's id until then
            self._run = self._init(mode := "offline")
        self._offline = mode == "offline"
        self._step = 0 if self._offline else int(self._run.starting_step)
        self._known = recorded if self._offline else self._step - 1
        self._catch_up()

    def _init(self, mode: str) -> Any:
        wandb = _wandb()
        return wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            group=self._config.group,
            tags=list(self._config.tags) or None,
            id=self._run_id,
            name=self._run_id,
            config=self._resolved,
            dir=str(self._folder.absolute()),
            mode=mode,
            resume="allow" if mode == "online" else None,
            allow_val_change=True,
            settings=wandb.Settings(
                init_timeout=self._config.start_seconds,
                finish_timeout=0.8 * self._config.finish_seconds,
                finish_timeout_raises=True,
                console="off",  # it would replace sys.stdout, which belongs to Ray's worker
                silent=True,
            ),
        )


def _wandb() -> Any:
    """The module, imported late (most of a second), without its telemetry, which holds up the exit at a dead server."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def unreachable(url: str, key: str | None) -> str | None:
    """Why a W&B server cannot be used, or None where it answers: one request, of a few seconds at most."""
    if key is None:
        return "has no API key here"
    token = base64.b64encode(f"api:{key}".encode()).decode()
    request = urllib.request.Request(
        f"{url}/graphql",
        data=json.dumps({"query": "query { viewer { id } }"}).encode(),
        headers={"Content-Type": "application/json", "Authorization": f"Basic {token}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return "refused the API key"
        return f"answered {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        return f"did not answer ({_first_line(error)})"
    return None


def _artifact(kind: str, digest: str, metadata: dict[str, Any]) -> Any:
    """A few bytes that stand for our artifact: equal digests give equal W&B artifacts, and so the lineage joins up."""
    artifact = _wandb().Artifact(artifact_name(kind, digest), type=kind, metadata=metadata)
    with artifact.new_file("digest.json", mode="w") as file:
        json.dump({"kind": kind, "digest": digest}, file, sort_keys=True)
    return artifact


def _use(run: Any, artifact: Any, *, offline: bool) -> None:
    """Declare an input. `use_artifact` raises offline, though the run's file can carry the same statement."""
    if not offline:
        run.use_artifact(artifact)
    elif hasattr(run, "_log_artifact"):
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.log_artifact(artifact)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
