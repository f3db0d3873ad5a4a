"""What a check found, and how several are shown: a table for people, JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from latentray.errors import LatentrayError

OK, WARNING, FAILED = "ok", "warning", "failed"
STATUSES = (OK, WARNING, FAILED)
"""From good to bad."""
_COLOURS = {OK: "green", WARNING: "yellow", FAILED: "red"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check."""

    name: str
    status: str
    what: str
    mend: str = ""
    """What to do about it; empty where all is well."""

    @classmethod
    def ok(cls, name: str, what: str) -> Finding:
        return cls(name=name, status=OK, what=what)

    @classmethod
    def warning(cls, name: str, what: str, mend: str) -> Finding:
        return cls(name=name, status=WARNING, what=what, mend=mend)

    @classmethod
    def failed(cls, name: str, what: str, mend: str) -> Finding:
        return cls(name=name, status=FAILED, what=what, mend=mend)


def worst(found: Iterable[Finding]) -> str:
    """The worst status among findings; ok for none."""
    return max((one.status for one in found), key=STATUSES.index, default=OK)


def guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; whatever it raises is a finding too, so that one broken thing hides no other."""
    try:
        return check()
    except LatentrayError as error:
        where = f" ({error.where})" if error.where else ""
        return [Finding.failed(name, f"{error.what}{where}", error.mend or "Mend the cause.")]
    except Exception as error:
        return [
            Finding.failed(name, f"The check itself failed: {first_line(error)}", "Mend the cause, and run it again.")
        ]


def over_nodes(check: Callable[[Any], Finding], facts: Mapping[str, Any]) -> list[Finding]:
    """One check of several nodes' facts: one finding where all are well, else one for each node that is not."""
    found = {node: check(one) for node, one in facts.items()}
    bad = [
        dataclasses.replace(one, name=f"{one.name} on {node}" if len(found) > 1 else one.name)
        for node, one in found.items()
        if one.status != OK
    ]
    if bad:
        return bad
    first = next(iter(found.values()))
    more = f" (and alike on {len(found) - 1} more)" if len(found) > 1 else ""
    return [dataclasses.replace(first, what=first.what + more)]


def first_line(error: BaseException) -> str:
    """An error's class and the first line it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def show(found: Iterable[Finding], console: Console) -> None:
    """Print a table, and below it what to mend, uncut."""
    found = list(found)
    table = Table("check", "", "what")
    for one in found:
        table.add_row(one.name, f"[{_COLOURS[one.status]}]{one.status}[/]", one.what)
    console.print(table)
    for one in found:
        if one.mend:
            console.print(f"{one.name}: {one.mend}", markup=False, soft_wrap=True)
