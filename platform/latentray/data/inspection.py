"""What an indexed data set holds, in numbers: from the index alone where it can, from a spread of decoded samples else."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from latentray.data import inspection_kinds, latents, members
from latentray.data.inspection_kinds import value_range
from latentray.data.kinds import LATENTS
from latentray.data.shards import IndexedShards
from latentray.errors import LatentrayError

ASPECTS = (0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
"""Edges of the aspect histogram, width over height; 0.95 to 1.05 counts as square."""

_GOLDEN = (5**0.5 - 1) / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """What reading samples showed."""

    checked: int
    caption_counts: list[int]
    captions: list[str]
    bad: list[dict[str, str]]
    """`key`, `shard` and `what` of each sample that could not be read, checked or decoded."""
    shown: list[tuple[np.ndarray, str]]
    """Pictures, uint8 (H, W, 3), with their first captions, for a contact sheet."""
    facts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What samples of this kind show (inspection_kinds)."""


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` positions (0: all) spread over `count`: one in each of as many equal parts.

    Where in its part follows the golden ratio: a fixed stride would meet only one kind of a data set whose kinds take turns.
    """
    if wanted == 0 or wanted >= count:
        return list(range(count))
    edges = [i * count // wanted for i in range(wanted + 1)]
    return [a + int((i * _GOLDEN) % 1 * (b - a)) for i, (a, b) in enumerate(itertools.pairwise(edges))]


def read(shards: IndexedShards, rows: Iterable[int], count: int, *, kind: str, show: int) -> Decoded:
    """Read, check and decode `count` samples; a bad one is listed and the rest goes on. Keeps `show` of the pictures.

    `rows` is taken one by one, so that it may tell how far the reading is.
    """
    wanted = set(spread(count, min(show, count) or 1))
    found = Decoded(checked=count, caption_counts=[], captions=[], bad=[], shown=[])
    for place, x in enumerate(rows):
        try:
            seen = inspection_kinds.LOOK[kind](members.decode_sample(shards.read(x)))
        except LatentrayError as error:
            found.bad.append({"key": shards.key(x), "shard": shards.locate(x)[0].name, "what": error.what})
            continue
        found.caption_counts.append(len(seen.captions))
        found.captions.extend(seen.captions)
        found.facts.append(seen.facts)
        if place in wanted and seen.picture is not None:
            found.shown.append((seen.picture, (seen.captions or [shards.key(x)])[0]))
    return found


def figures(shards: IndexedShards, decoded: Decoded, kind: str) -> dict[str, Any]:
    """Counts, sizes and aspects of all samples by the index; captions, damage and what is the kind's own of the decoded."""
    sizes = [entry.bytes for entry in shards.shards]
    found: dict[str, Any] = {
        "kind": kind,
        "samples": shards.count,
        "shards": len(shards.shards),
        "bytes": sum(sizes),
        "shard_bytes": value_range(sizes),
        "samples_per_shard": value_range([entry.count for entry in shards.shards]),
        "digest": shards.digest,
        "checked": decoded.checked,
        "bad": decoded.bad,
    }
    if {"width", "height"} <= set(shards.columns):
        width, height = (shards.column(name).to_numpy().astype(np.float64) for name in ("width", "height"))
        found |= {
            "width": value_range(width),
            "height": value_range(height),
            "megapixels": value_range(width * height / 1e6),
            "aspects": aspect_histogram(width / height),
        }
    if kind == LATENTS:
        found |= _of_store(shards)
    if decoded.facts:
        found |= inspection_kinds.FIGURES[kind](decoded.facts)
        by_index = {"frames", "fps", "steps"} & set(shards.columns) if kind != LATENTS else set()
        found |= {name: value_range(shards.index.numbers(name)) for name in by_index}
    if "sha256" in shards.columns:
        repeats = collections.Counter(shards.column("sha256").to_pylist())
        found["exact_duplicates"] = sum(n - 1 for n in repeats.values())
    if decoded.captions:
        found["captions"] = {
            "per_sample": value_range(decoded.caption_counts),
            "characters": value_range([len(text) for text in decoded.captions]),
            "words": value_range([len(text.split()) for text in decoded.captions]),
            "empty": sum(not text.strip() for text in decoded.captions),
            "distinct_share": len(set(decoded.captions)) / len(decoded.captions),
        }
    return found


def aspect_histogram(aspect_N: np.ndarray) -> dict[str, int]:
    """How many samples lie between two edges, such as `0.8-0.95`; the ends are open."""
    counts = np.bincount(np.searchsorted(ASPECTS, aspect_N, side="right"), minlength=len(ASPECTS) + 1)
    inner = [f"{a:g}-{b:g}" for a, b in itertools.pairwise(ASPECTS)]
    names = [f"<{ASPECTS[0]:g}", *inner, f">{ASPECTS[-1]:g}"]
    return {name: int(n) for name, n in zip(names, counts, strict=True)}


def _of_store(shards: IndexedShards) -> dict[str, Any]:
    """What a store of latents says of itself, and how many of its records have which shape."""
    store = latents.describe(shards.uri, shards.manifest)
    pairs = zip(shards.column("height").to_pylist(), shards.column("width").to_pylist(), strict=True)
    counts = collections.Counter(f"{height} x {width}" for height, width in pairs)
    found: dict[str, Any] = {
        "autoencoder": store.autoencoder_uri,
        "text_encoders": [one.name for one in store.texts],
        "variants": list(store.variants),
        "scale": dataclasses.asdict(store.scale),
        "buckets": dict(sorted(counts.items())),
    }
    return found | ({"frames": store.frames, "fps": store.fps} if store.frames else {})
