"""What every `python -m jobs.<name>` does around its one call: compose, `--help`, one clear error, exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.console import Console

from latentray.config import compose, describe
from latentray.errors import Interrupted, LatentrayError, Stopped

Schema = TypeVar("Schema")

USER_MISTAKE = 2
"""Exit code for a mistake of the user's and for a refused gate."""
STOPPED = 143
"""Exit code of a run that was asked to stop and can be resumed: what a shell gives to SIGTERM."""
INTERRUPTED = 130
"""Exit code of what Ctrl-C ended: what a shell gives to SIGINT."""


def run(name: str, schema: type[Schema], call: Callable[[Schema], Any], argv: Sequence[str] | None = None) -> int:
    """Run a job from its command line and return its exit code.

    `--help` prints how to run it, its settings and its groups; `--cfg` prints the resolved configuration. A
    LatentrayError is printed as one message without a traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _quieten_ray()
    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        if "--help" in args or "-h" in args:
            _help(name, schema, call, out, [a for a in args if a not in ("--help", "-h")])
            return 0
        if "--cfg" in args:
            out.print(compose.to_yaml(compose.compose(name, [a for a in args if a != "--cfg"])), markup=False)
            return 0
        call(compose.load(name, schema, args))
        return 0
    except (Stopped, Interrupted) as error:
        err.print(f"{error.what}\n  resume it with: {error.mend}", markup=False, soft_wrap=True)
        return STOPPED if isinstance(error, Stopped) else INTERRUPTED
    except LatentrayError as error:
        err.print(f"error: {error}", markup=False, soft_wrap=True)
        return USER_MISTAKE
    except KeyboardInterrupt:
        err.print("interrupted", markup=False)
        return INTERRUPTED
    except Exception as error:
        known = known_cause(error)
        if known is None:
            traceback.print_exc()
            return 1
        err.print(f"error: {known}", markup=False, soft_wrap=True)
        return USER_MISTAKE


def _quieten_ray() -> None:
    """Keep Ray's own chatter off a user's terminal; what the user set stands. Ray reads these when it is imported."""
    chatter = (
        "Failed to query Ray Train Controller",  # its cleaner asks the dashboard, which a local cluster goes without
        "Reporting training result",
        "object store and max_restarts",
    )
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(chatter))
    os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints each line of a worker twice
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how long a report of a checkpoint blocks


def known_cause(error: BaseException) -> LatentrayError | None:
    """The LatentrayError inside an error that Ray wrapped on its way from a worker."""
    seen: set[int] = set()
    queue: list[Any] = [error]
    while queue:
        one = queue.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, LatentrayError):
            return one
        failures = getattr(one, "worker_failures", None) or {}
        queue += [getattr(one, "cause", None), one.__cause__, *failures.values()]
    return None


def _help(name: str, schema: type, call: Callable, out: Console, overrides: Sequence[str]) -> None:
    def show(text: str) -> None:
        out.print(text, markup=False, soft_wrap=True)  # a command that is cut in two cannot be pasted

    module = sys.modules.get("__main__")
    show(((module and module.__doc__) or call.__doc__ or "").strip())
    show(f"\nSettings (override as key=value; defaults from conf/{name}.yaml):\n")
    show(describe.settings(compose.to_plain(compose.compose(name, overrides)), schema))
    groups = compose.groups_of(name)
    if groups:
        show("\nGroups (override as group=name):")
    for group, names in groups.items():
        show(f"  {group}: {', '.join(names)}")
