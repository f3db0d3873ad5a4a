"""The pipeline as a graph: which artifact was made from which, drawn as SVG whose colours the page's CSS sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

BOX_W, BOX_H, GAP_ALONG, GAP_ACROSS, EDGE = 140, 58, 34, 18, 6

TITLES = {
    "dataset": "shards",
    "text_encoder": "text encoder",
    "autoencoder": "autoencoder",
    "latents": "latents",
    "checkpoint": "checkpoint",
    "model": "model",
    "classifier": "classifier",
    "report": "report",
    "release": "release",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Node:
    """One artifact of the lineage."""

    title: str
    kind: str
    uri: str
    digest: str
    inputs: dict[str, str]
    """Role -> digest, as in its manifest."""
    parents: tuple[int, ...] = ()
    """Positions of the artifacts to draw an arrow from; those implied by a longer way are left out."""
    layer: int = 0
    """Longest way from an artifact without parents."""

    @property
    def short(self) -> str:
        return short(self.digest)


def short(digest: str) -> str:
    """The first twelve characters of a digest, without the algorithm's name."""
    return digest.removeprefix("sha256:")[:12] or "no digest"


def nodes(lineage: Sequence[Mapping[str, Any]]) -> list[Node]:
    """Layered nodes from a report's `lineage`. An input that is not in the lineage is passed over, a cycle is cut."""
    entries = [entry for entry in lineage if isinstance(entry, Mapping)]
    position = {str(entry.get("digest") or ""): index for index, entry in enumerate(entries)}
    position.pop("", None)
    given: list[list[int]] = []
    for index, entry in enumerate(entries):
        digests = (entry.get("inputs") or {}).values()
        given.append(sorted({position[str(d)] for d in digests if str(d) in position} - {index}))
    above = [_ancestors(index, given) for index in range(len(entries))]
    kept = [[p for p in given[i] if i not in above[p]] for i in range(len(entries))]
    reduced = [[p for p in kept[i] if not any(p in above[q] for q in kept[i] if q != p)] for i in range(len(entries))]
    layers: dict[int, int] = {}

    def layer(index: int) -> int:
        if index not in layers:
            layers[index] = 1 + max((layer(p) for p in kept[index]), default=-1)
        return layers[index]

    return [
        Node(
            title=TITLES.get(str(e.get("role")), str(e.get("role") or e.get("kind") or "artifact").replace("_", " ")),
            kind=str(e.get("kind") or ""),
            uri=str(e.get("uri") or ""),
            digest=str(e.get("digest") or ""),
            inputs={str(k): str(v) for k, v in (e.get("inputs") or {}).items()},
            parents=tuple(reduced[i]),
            layer=layer(i),
        )
        for i, e in enumerate(entries)
    ]


def _ancestors(start: int, given: list[list[int]]) -> set[int]:
    seen: set[int] = set()
    stack = list(given[start])
    while stack:
        index = stack.pop()
        if index not in seen:
            seen.add(index)
            stack += given[index]
    return seen


def svg(graph: Sequence[Node], *, vertical: bool) -> str:
    """The graph from left to right, or from top to bottom for narrow screens; full digests show on hover."""
    if not graph:
        return ""
    rows: dict[int, list[int]] = {}
    for index, node in enumerate(graph):
        rows.setdefault(node.layer, []).append(index)
    along, across = (BOX_H, BOX_W) if vertical else (BOX_W, BOX_H)
    span = max(len(row) for row in rows.values()) * (across + GAP_ACROSS) - GAP_ACROSS
    corner: dict[int, tuple[float, float]] = {}
    for layer, row in rows.items():
        first = EDGE + (span - (len(row) * (across + GAP_ACROSS) - GAP_ACROSS)) / 2
        for place, index in enumerate(row):
            a, b = EDGE + layer * (along + GAP_ALONG), first + place * (across + GAP_ACROSS)
            corner[index] = (b, a) if vertical else (a, b)
    length = len(rows) * (along + GAP_ALONG) - GAP_ALONG + 2 * EDGE
    width, height = (span + 2 * EDGE, length) if vertical else (length, span + 2 * EDGE)

    parts: list[str] = []
    for index, node in enumerate(graph):
        x, y = corner[index]
        for parent in node.parents:
            px, py = corner[parent]
            if vertical:
                sx, sy, tx, ty = px + BOX_W / 2, py + BOX_H, x + BOX_W / 2, y - 5
                bend = f"C{sx:g},{(sy + ty) / 2:g} {tx:g},{(sy + ty) / 2:g}"
                head = f"M{tx - 4:g},{ty - 2:g} L{tx:g},{ty + 4:g} L{tx + 4:g},{ty - 2:g}Z"
            else:
                sx, sy, tx, ty = px + BOX_W, py + BOX_H / 2, x - 5, y + BOX_H / 2
                bend = f"C{(sx + tx) / 2:g},{sy:g} {(sx + tx) / 2:g},{ty:g}"
                head = f"M{tx - 2:g},{ty - 4:g} L{tx + 4:g},{ty:g} L{tx - 2:g},{ty + 4:g}Z"
            parts.append(f'<path class="edge" d="M{sx:g},{sy:g} {bend} {tx:g},{ty:g}"/><path class="head" d="{head}"/>')
        hover = "\n".join(line for line in (node.kind, node.digest, node.uri) if line)
        kind = "box last" if node.kind == "release" else "box"
        parts.append(
            f"<g><title>{escape(hover)}</title>"
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{BOX_W}" height="{BOX_H}" rx="8"/>'
            f'<text class="name" x="{x + 12:g}" y="{y + 24:g}">{escape(node.title[:18])}</text>'
            f'<text class="hash" x="{x + 12:g}" y="{y + 43:g}">{escape(node.short)}</text></g>'
        )
    label = quoteattr("Lineage: " + ", ".join(node.title for node in graph))
    return (
        f'<svg class="graph {"tall" if vertical else "wide"}" role="img" aria-label={label} '
        f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px">{"".join(parts)}</svg>'
    )
