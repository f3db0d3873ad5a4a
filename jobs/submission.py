"""The submission behind `python -m jobs.submit`: checks first, then one call of the Ray Jobs API, then its output."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import datetime
import difflib
import itertools
import logging
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import tenacity

from latentray.config import command, compose
from latentray.config.submit import SubmitConfig
from latentray.errors import AlreadyExists, ConfigError, EnvironmentRefused

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CHECKOUT = Path(__file__).resolve().parents[1]
"""What travels to the cluster: the folder that holds jobs/, platform/, conf/ and serving/."""

POLL_S = 0.3
"""The output ends a moment before the status is written; asking again costs one small request."""

ENDED = frozenset({0, command.USER_MISTAKE, command.STOPPED, 130})
"""Exit codes of a job that another attempt would not end otherwise: done, refused, stopped, interrupted."""

NOT_SENT = frozenset({"submit"})
"""Jobs that make no sense on a cluster."""


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """This command's settings, and the job's, which stand after `--`."""
    if "--" not in argv:
        return list(argv), []
    cut = list(argv).index("--")
    return list(argv[:cut]), list(argv[cut + 1 :])


def job_names() -> list[str]:
    """The jobs that can be sent: modules of jobs/ that run as a program."""
    return sorted(p.stem for p in (CHECKOUT / "jobs").glob("*.py") if _is_program(p) and p.stem not in NOT_SENT)


def _is_program(path: Path) -> bool:
    tests = (node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


def require_job(name: str) -> None:
    """Raise ConfigError, naming the nearest, where there is no such job."""
    known = job_names()
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean job={near[0]}? " if near else ""
    raise ConfigError(f"There is no job {name!r} to send.", where="job", mend=f"{hint}Known: {', '.join(known)}.")


def require_cluster(address: str, timeout_s: float) -> None:
    """Raise EnvironmentRefused where nothing accepts a connection: the client itself would wait for minutes."""
    url = urlsplit(address)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((str(url.hostname), port), timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        raise EnvironmentRefused(
            f"No Ray cluster answers there ({error}).",
            where=address,
            mend="Start one (ray start --head), forward its dashboard's port, or give another address=http://<host>:8265.",
        ) from None


def entrypoint(config: SubmitConfig, overrides: Sequence[str]) -> str:
    """The shell command that the cluster runs in the shipped checkout."""
    return f"{config.python} -m jobs.{config.job} {shlex.join(overrides)}".rstrip()


def runtime_env(config: SubmitConfig) -> dict[str, Any]:
    """What Ray prepares for the job and for each of its workers: the checkout, with platform/ as its source root."""
    # PYTHONPATH is relative to the working directory, in which Ray starts the job and every worker.
    return {"working_dir": str(CHECKOUT), "env_vars": {"PYTHONPATH": "platform", "PYTHONUNBUFFERED": "1", **config.env}}


def submit(config: SubmitConfig, more_overrides: Sequence[str] = ()) -> int:
    """Send one job and, where `wait`, follow it; returns the job's exit code (0 where it does not wait).

    Raises ConfigError (unknown job or setting), EnvironmentRefused (no cluster, no access, too large a checkout) and
    AlreadyExists (the submission id belongs to another command), all before anything runs on the cluster.
    """
    require_job(config.job)
    overrides = named([*config.overrides, *more_overrides], job=config.job, retries=config.retries)
    compose.compose(config.job, overrides)  # keys and groups only: a path in them is the cluster's, not this machine's
    require_cluster(config.address, config.connect_timeout_s)
    client = connect(config.address)
    for attempt in itertools.count():
        code = _once(client, config, overrides, attempt)
        if not is_worth_another(code, attempt, config.retries):
            return code
        print(f"sent again ({attempt + 1} of {config.retries})", flush=True)
    raise AssertionError("count() does not end")


def named(overrides: Sequence[str], *, job: str, retries: int) -> list[str]:
    """The settings of a job that may be sent again: a training run gets a name, so that it goes on and does not begin anew."""
    if not retries or job != "train" or any(one.startswith("run=") for one in overrides):
        return list(overrides)
    return [*overrides, f"run=train-{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"]


def is_worth_another(code: int, attempt: int, retries: int) -> bool:
    """Whether a job that ended with this exit code is sent again, after so many attempts before it."""
    return code not in ENDED and attempt < retries


def _once(client: JobSubmissionClient, config: SubmitConfig, overrides: Sequence[str], attempt: int) -> int:
    """Send the job and, where `wait`, follow it to its end."""
    if attempt and config.submission_id is not None:
        config = dataclasses.replace(config, submission_id=f"{config.submission_id}.{attempt}")
    submission_id = _send(client, config, entrypoint(config, overrides))
    print(f"job {submission_id} at {config.address}: {entrypoint(config, overrides)}", flush=True)
    commands = f"ray job logs --follow --address {config.address} {submission_id}"
    if not config.wait:
        print(f"follow it:  {commands}\nstop it:    {commands.replace('logs --follow', 'stop')}", flush=True)
        return 0
    try:
        return follow(client, submission_id)
    except KeyboardInterrupt:
        print(f"\nThe job goes on. Follow it: {commands}\nStop it: {commands.replace('logs --follow', 'stop')}")
        raise


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's Jobs API. Raises EnvironmentRefused where it is not one or refuses the token."""
    # Imported late: it takes a second, and a misspelt setting is told before that.
    logging.getLogger("ray._private.runtime_env").setLevel(logging.ERROR)  # one line per ignore file it reads
    logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise EnvironmentRefused(
            "The cluster refused the token, or none was sent.",
            where=address,
            mend="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token.",
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise EnvironmentRefused(
            f"What answers there is not a Ray Jobs API ({str(error).splitlines()[0]}).",
            where=address,
            mend="Give the dashboard's address, by default http://<head>:8265.",
        ) from None


def _send(client: JobSubmissionClient, config: SubmitConfig, command: str) -> str:
    """Submit, or find the job that a repeated submission id already names; returns the id."""
    try:
        return client.submit_job(
            entrypoint=command,
            runtime_env=runtime_env(config),
            submission_id=config.submission_id,
            metadata={"latentray.job": config.job},
            entrypoint_num_cpus=config.cpus or None,
            entrypoint_num_gpus=config.gpus or None,
        )
    except (RuntimeError, ValueError) as error:
        if config.submission_id is not None and "already exists" in str(error):
            running = client.get_job_info(config.submission_id)
            if running.entrypoint == command:
                return config.submission_id
            raise AlreadyExists(
                f"The submission {config.submission_id!r} is another job: {running.entrypoint}",
                where="submission_id",
                mend="Give another submission_id, or none.",
            ) from None
        raise EnvironmentRefused(
            f"The cluster did not take the job: {str(error).strip().splitlines()[-1]}",
            where=config.address,
            mend="If the checkout is too large, list what the cluster does not need in .rayignore.",
        ) from None


def follow(client: JobSubmissionClient, submission_id: str, write: Callable[[str], Any] | None = None) -> int:
    """Stream a job's output until it ends; returns its exit code (1 where it died without one).

    A dropped connection (a restarting proxy, a sleeping laptop) does not end a job that runs for days: the output is
    taken up where it stopped. Behind a proxy without WebSockets it comes in portions.
    """
    import aiohttp

    printed = 0

    async def tail() -> None:
        nonlocal printed
        position = 0  # every connection starts over: skip what is on the screen already
        async for text in client.tail_job_logs(submission_id):
            emit(text[max(0, printed - position) :])
            position += len(text)
            printed = max(printed, position)

    def emit(text: str) -> None:
        if text and write is not None:
            write(text)
        elif text:
            print(text, end="", flush=True)

    while True:
        try:
            asyncio.run(tail())
        except (RuntimeError, OSError, aiohttp.ClientError):
            rest = _retrying(lambda: client.get_job_logs(submission_id))[printed:]
            emit(rest)
            printed += len(rest)
        info = _retrying(lambda: client.get_job_info(submission_id))
        if info.status.is_terminal():
            break
        time.sleep(POLL_S)
    print(f"job {submission_id}: {info.status.value.lower()}", flush=True)
    if info.status.value == "SUCCEEDED":
        return 0
    if info.driver_exit_code is None:
        print(f"  {info.message}", file=sys.stderr)
    return info.driver_exit_code or 1


def _retrying(call: Callable[[], Any]) -> Any:
    """One short call of the Jobs API, repeated for up to five minutes while the cluster does not answer."""
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type((RuntimeError, OSError)),
        wait=tenacity.wait_exponential_jitter(initial=POLL_S, max=30.0),
        stop=tenacity.stop_after_delay(300),
        reraise=True,
    )
    return retry(call)
