"""Promotion: gates as pure decisions, and the one function that acts on them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from latentray.checkpoint import manifest, store
from latentray.config.promote import Gate, PromoteConfig, RelativeToLive
from latentray.errors import ArtifactError, ConfigError, GateRefused, InputMissing
from latentray.registry import report as reports
from latentray.registry import versions
from latentray.registry.report import EvaluationReport, comparable, direction


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateResult:
    """What one bound of a gate wanted, and what it got."""

    metric: str
    wanted: str
    got: float | str | None
    """The report's figure; None where there is none."""
    passed: bool
    why: str = ""
    """The reason, where the figures alone do not say it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """`promoted`: every gate passed; `refused`: one did not; `invalid`: a figure is missing or not finite."""

    decision: Literal["promoted", "refused", "invalid"]
    gates: tuple[GateResult, ...]

    @property
    def failed(self) -> tuple[GateResult, ...]:
        return tuple(g for g in self.gates if not g.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a figure that is not finite becomes null."""
        gates = [dataclasses.asdict(g) for g in self.gates]
        for gate in gates:
            if isinstance(gate["got"], float) and not math.isfinite(gate["got"]):
                gate["got"] = None
        return {"decision": self.decision, "gates": gates}


def decide(
    report: EvaluationReport,
    live: EvaluationReport | None,
    gates: Sequence[Gate],
    *,
    allow_incomparable: bool = False,
    live_problem: str | None = None,
) -> Decision:
    """Hold a report against gates and the live release's report. Pure.

    With no live release the relative bounds pass. Where the two cannot be compared (`live_problem` says why the live
    report cannot be read) they are refused, unless `allow_incomparable`. Raises ConfigError for a gate on a metric
    that no report can have.
    """
    reason = live_problem or (comparable(report, live) if live else None)
    results: list[GateResult] = []
    valid = True
    for gate in gates:
        try:
            direction(gate.metric)
        except ValueError as error:
            raise ConfigError(
                f"A gate is on an unknown metric: {error}", where="gates", mend="Correct its name."
            ) from None
        got = report.metrics.get(gate.metric)
        if got is None or not math.isfinite(got):
            valid = False
            why = "the report has no such metric" if got is None else f"the report's figure is {got}"
            results.append(GateResult(metric=gate.metric, wanted=_wanted(gate), got=got, passed=False, why=why))
            continue
        results += _absolute(gate, got)
        if gate.relative_to_live is not None:
            results.append(_relative(gate.metric, gate.relative_to_live, got, live, reason, allow_incomparable))
    passed = all(r.passed for r in results)
    return Decision(decision="invalid" if not valid else "promoted" if passed else "refused", gates=tuple(results))


def _absolute(gate: Gate, got: float) -> list[GateResult]:
    bounds = []
    if gate.min is not None:
        bounds.append((f">= {gate.min:g}", got >= gate.min))
    if gate.max is not None:
        bounds.append((f"<= {gate.max:g}", got <= gate.max))
    if not bounds and gate.relative_to_live is None:
        bounds.append(("a finite number", True))
    return [GateResult(metric=gate.metric, wanted=wanted, got=got, passed=passed) for wanted, passed in bounds]


def _relative(
    metric: str,
    bound: RelativeToLive,
    got: float,
    live: EvaluationReport | None,
    reason: str | None,
    allow_incomparable: bool,
) -> GateResult:
    wanted = f"at most {bound.max_regression:.0%} worse than live"
    before = live.metrics.get(metric) if live else None
    if live is None and reason is None:
        return GateResult(metric=metric, wanted=wanted, got=got, passed=True, why="no live release yet")
    if reason is None and (before is None or not math.isfinite(before)):
        reason = "the live release's report has no such figure"
    if reason is not None or before is None:
        why = f"not comparable with the live release: {reason}"
        return GateResult(metric=metric, wanted=wanted, got=got, passed=allow_incomparable, why=why)
    worse_by = got - before if direction(metric) == "lower" else before - got
    allowed = bound.max_regression * abs(before)
    sign, limit = ("<=", before + allowed) if direction(metric) == "lower" else (">=", before - allowed)
    wanted = f"{sign} {limit:.6g} ({wanted}: {before:.6g})"
    return GateResult(metric=metric, wanted=wanted, got=got, passed=worse_by <= allowed)


def _wanted(gate: Gate) -> str:
    parts = [r.wanted for r in _absolute(gate, 0.0)]
    if gate.relative_to_live is not None:
        parts.append(f"at most {gate.relative_to_live.max_regression:.0%} worse than live")
    return ", ".join(parts)


def promote(config: PromoteConfig) -> str:
    """Read a model and its report, decide, create the release and move the alias; return the release's id.

    Prints a table, and as its last line on stdout the decision as JSON. Raises GateRefused where a gate did not pass.
    """
    model_uri, report_uri, registry = (store.absolute(u) for u in (config.model, config.report, config.registry))
    model = manifest.read(model_uri, kind="model")
    report = reports.load(report_uri)
    alias = versions.read_alias(registry, config.alias)
    if report.model != model.digest:
        result = GateResult(
            metric="model", wanted=model.digest, got=report.model, passed=False, why="the report is of another model"
        )
        decision = Decision(decision="refused", gates=(result,))
    else:
        live, problem = _live_report(registry, config.alias) if alias else (None, None)
        decision = decide(
            report, live, config.gates, allow_incomparable=config.allow_incomparable, live_problem=problem
        )
    before = alias.release if alias else None
    facts = {"alias": config.alias, "live_before": before, "release": None}
    if decision.decision != "promoted":
        _print(decision, facts)
        raise _refusal(decision, report_uri)
    release = versions.create(model_uri, report, registry, license=config.license)
    versions.move_alias(registry, config.alias, release)
    uri = versions.release_uri(registry, release)
    hints = [
        f"{config.alias} is now {release} (before: {before or 'nothing'}): {uri}",
        f"next: python -m jobs.serve registry={config.registry} alias={config.alias}",
        f"back: python -m jobs.rollback registry={config.registry} alias={config.alias}",
    ]
    _print(decision, facts | {"release": release, "uri": uri}, hints)
    return release


def _live_report(registry: str, alias: str) -> tuple[EvaluationReport | None, str | None]:
    """The live release's report, or why it cannot be read: a damaged release must not block the one that mends it."""
    try:
        return versions.report_of(registry, alias), None
    except (ArtifactError, InputMissing) as error:
        return None, f"its report cannot be read: {error.what}"


def _refusal(decision: Decision, report_uri: str) -> GateRefused:
    lines = []
    for gate in decision.failed:
        got = f"{gate.got:.6g}" if isinstance(gate.got, float) else (gate.got or "nothing")
        lines.append(f"{gate.metric}: wanted {gate.wanted}, got {got}" + (f" ({gate.why})" if gate.why else ""))
    if decision.decision == "invalid":
        mend = "Evaluate again so that the report has every gated figure: python -m jobs.evaluate"
    elif any("not comparable" in gate.why for gate in decision.failed):
        mend = "Evaluate both releases alike, or accept the difference with allow_incomparable=true."
    elif any(gate.metric == "model" for gate in decision.failed):
        mend = "Evaluate this very model: python -m jobs.evaluate model=<uri>"
    else:
        mend = "Train longer or better; or lower the bound in conf/gates/, if it asks too much."
    return GateRefused(f"Promotion {decision.decision}. " + "; ".join(lines), where=report_uri, mend=mend)


def _print(decision: Decision, facts: dict[str, Any], hints: Sequence[str] = ()) -> None:
    console = Console(highlight=False)
    table = Table(title=f"decision: {decision.decision}")
    for heading in ("gate", "wanted", "got", "passed", "why"):
        table.add_column(heading, overflow="fold")
    for gate in decision.gates:
        got = f"{gate.got:.6g}" if isinstance(gate.got, float) else str(gate.got)
        table.add_row(gate.metric, gate.wanted, got, "yes" if gate.passed else "NO", gate.why)
    console.print(table)
    for hint in hints:
        console.print(hint, markup=False, soft_wrap=True)
    print(json.dumps(decision.to_json() | facts), flush=True)
