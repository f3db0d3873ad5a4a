"""The quickstart's page: one self-contained HTML file, made from its report, its pictures and its curves.

Nothing on it is loaded from anywhere, so it can be mailed or attached to a CI run. What the report does not have is
shown as "not measured"; a page always comes out.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from PIL import Image

from latentray.reporting import lineage as lineage_graph
from latentray.reporting.progress import duration

MISSING = "not measured"
SAMPLE_PREFIX = "sample:"
"""A picture called `sample:<caption>` stands in the table of captions; the others get a section of their own."""

PICTURE_TITLES = {"reconstructions": "Originals and reconstructions", "captions": "Drawn through the endpoint"}
_CAPTION = re.compile(r"an? (\w+) (\w+) on an? (\w+) background")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A key figure of the report and how it reads."""

    key: str
    label: str
    unit: str
    """`dB`, `share` (0 to 1, shown as a percentage) or `time` (seconds)."""
    at_most: bool = False
    """True where less is better."""


FIGURES = (
    Figure(key="autoencoder.psnr", label="Reconstruction, PSNR", unit="dB"),
    Figure(key="samples.color_accuracy", label="Colour right", unit="share"),
    Figure(key="samples.background_accuracy", label="Background right", unit="share"),
    Figure(key="samples.shape_accuracy", label="Shape right", unit="share"),
    Figure(key="samples.heldout_color_accuracy", label="Colour right, unseen combinations", unit="share"),
    Figure(key="total_seconds", label="Total time", unit="time", at_most=True),
)


def quickstart_page(report: Mapping[str, Any], pictures: Mapping[str, Image.Image], curves: Mapping[str, str]) -> str:
    """The whole page as HTML.

    Args:
        report: `autoencoder.psnr`, `samples.{color,background,shape,heldout_color}_accuracy`, `samples.heldout` (the
            captions left out of training), `release.id`, `lineage`, `timings`, `total_seconds`, `targets`, `commands`,
            `machine`, `notes`, `config`; any of them may be missing. `targets` is nested like the report or dotted.
            A command is a string or `{"title", "command"}`.
        pictures: `reconstructions`, any others by name, and `sample:<caption>` for each caption drawn.
        curves: title -> SVG.
    """
    cards = [_card(figure, report) for figure in FIGURES]
    graph = lineage_graph.nodes(_list(report.get("lineage")))
    samples = {n.removeprefix(SAMPLE_PREFIX): p for n, p in pictures.items() if n.startswith(SAMPLE_PREFIX)}
    unseen = {str(caption) for caption in _list(value_at(report, "samples.heldout"))}
    blocks, others = _caption_blocks(samples, unseen)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            headline=_headline(report),
            verdict=_verdict(cards),
            release=value_at(report, "release.id"),
            cards=cards,
            graph=graph,
            graph_wide=lineage_graph.svg(graph, vertical=False),
            graph_tall=lineage_graph.svg(graph, vertical=True),
            short=lineage_graph.short,
            pictures=[
                {
                    "title": PICTURE_TITLES.get(name, name.replace("_", " ").capitalize()),
                    "uri": data_uri(picture),
                    "w": picture.width,
                }
                for name, picture in pictures.items()
                if not name.startswith(SAMPLE_PREFIX)
            ],
            blocks=blocks,
            other_samples=others,
            unseen=sorted(unseen),
            curves=[{"title": title, "uri": svg_uri(svg)} for title, svg in curves.items()],
            timings=_timings(report),
            config=config_text(report.get("config")),
            commands=[
                c if isinstance(c, Mapping) else {"title": "", "command": str(c)} for c in _list(report.get("commands"))
            ],
            machine={str(k): str(v) for k, v in (report.get("machine") or {}).items()},
            notes=[str(note) for note in _list(report.get("notes"))],
        )
    )


def value_at(report: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, nested or written with its dots; None where there is none."""
    if key in report:
        return report[key]
    head, _, rest = key.partition(".")
    inner = report.get(head)
    return value_at(inner, rest) if rest and isinstance(inner, Mapping) else None


def number_at(report: Mapping[str, Any], key: str) -> float | None:
    """The finite number at a dotted key; None where it is missing, NaN, or no number."""
    value = value_at(report, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def data_uri(picture: Image.Image) -> str:
    """A picture as a PNG inside a `data:` URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def svg_uri(svg: str) -> str:
    """An SVG inside a `data:` URI, as an image: its ids cannot collide with another's, and no script in it runs."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _card(figure: Figure, report: Mapping[str, Any]) -> dict[str, Any]:
    value = number_at(report, figure.key)
    target = number_at(report.get("targets") or {}, figure.key)
    passed = None
    if value is not None and target is not None:
        passed = value <= target if figure.at_most else value >= target
    return {
        "label": figure.label,
        "value": _shown(value, figure.unit),
        "target": f"{'at most' if figure.at_most else 'at least'} {_shown(target, figure.unit)}"
        if target is not None
        else "",
        "state": "none" if passed is None else "pass" if passed else "miss",
        "word": (MISSING if value is None else "no target") if passed is None else "met" if passed else "missed",
        "share": None if value is None or figure.unit != "share" else max(0.0, min(1.0, value)) * 100,
        "mark": None if target is None or figure.unit != "share" else max(0.0, min(1.0, target)) * 100,
    }


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "—"
    if unit == "share":
        return f"{math.floor(value * 1000 + 1e-6) / 10:g} %"  # rounded down: 0.8999 must not read as 90 %
    return duration(value) if unit == "time" else f"{value:.1f} {unit}"


def _headline(report: Mapping[str, Any]) -> str:
    total = number_at(report, "total_seconds")
    return f"From pixels to an endpoint in {duration(total)}" if total is not None else "From pixels to an endpoint"


def _verdict(cards: list[dict[str, Any]]) -> dict[str, str]:
    judged = [card for card in cards if card["state"] != "none"]
    missed = [card["label"] for card in judged if card["state"] == "miss"]
    if not judged:
        return {"state": "none", "text": "No target was measured"}
    if missed:
        return {"state": "miss", "text": f"{len(judged) - len(missed)} of {len(judged)} targets met"}
    unmeasured = sum(card["word"] == MISSING for card in cards)
    text = f"All {len(judged)} measured targets met" if unmeasured else f"All {len(judged)} targets met"
    return {"state": "pass", "text": text}


def _caption_blocks(
    samples: Mapping[str, Image.Image], unseen: set[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One table per shape (rows: colours, columns: backgrounds), and what no such table has a place for."""
    cells: dict[tuple[str, str, str], dict[str, Any]] = {}
    others: list[dict[str, Any]] = []
    for caption, picture in samples.items():
        cell = {"caption": caption, "uri": data_uri(picture), "unseen": caption in unseen, "w": picture.width}
        found = _CAPTION.fullmatch(caption)
        if found:
            color, shape, background = found.groups()
            cells[shape, color, background] = cell
        else:
            others.append(cell)
    shapes, colors, backgrounds = (list(dict.fromkeys(key[i] for key in cells)) for i in range(3))
    blocks = [
        {
            "shape": shape,
            "backgrounds": backgrounds,
            "rows": [{"color": c, "cells": [cells.get((shape, c, b)) for b in backgrounds]} for c in colors],
        }
        for shape in shapes
    ]
    return blocks, others


def _timings(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bars of a waterfall: the stages run one after another, so each starts where the last one ended."""
    stages = report.get("timings") or {}
    known = [(str(name).replace("_", " "), number_at(stages, name)) for name in stages]
    spent = sum(seconds for _, seconds in known if seconds)
    total = number_at(report, "total_seconds") or spent
    if total - spent > 0.01 * total:
        known.append(("between the stages", total - spent))
    scale = 100 / max(total, spent, 1e-9)
    bars: list[dict[str, Any]] = []
    start = 0.0
    for name, seconds in known:
        bars.append(
            {
                "name": name,
                "text": MISSING if seconds is None else duration(seconds),
                "start": start * scale,
                "width": (seconds or 0.0) * scale,
            }
        )
        start += seconds or 0.0
    return bars


def config_text(config: Any, indent: int = 0) -> str:
    """A nested configuration in YAML's look; a text as it is."""
    if config is None or isinstance(config, str):
        return config or ""
    lines: list[str] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{' ' * indent}{key}:", config_text(value, indent + 2)]
        else:
            lines.append(f"{' ' * indent}{key}: {value}")
    return "\n".join(lines)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("latentray.reporting", package_path="")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
