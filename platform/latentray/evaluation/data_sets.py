"""`python -m jobs.inspect_shards`: a data set's figures as a table and JSON, and its pictures on a contact sheet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from latentray.checkpoint import manifest, store
from latentray.config.inspect_shards import InspectShards
from latentray.data import inspection, kinds, latents
from latentray.data.shards import IndexedShards
from latentray.errors import InputMissing
from latentray.reporting import pictures
from latentray.reporting.progress import tracked

SPLITS = ("train", "validation")
_CELL = 128
_CAPTION = 70
_MOST_NUMBERS = 16


def inspect(config: InspectShards) -> list[dict[str, Any]]:
    """Inspect each split and return its figures. Raises InputMissing where there is no data set; damage is a finding."""
    found = []
    for name, uri in _splits(store.absolute(config.data or "")).items():
        is_latents = manifest.read(uri).kind == latents.KIND
        shards = IndexedShards.open(uri, kind=latents.KIND if is_latents else "dataset")
        kind, rows = kinds.kind_of(shards), inspection.spread(shards.count, config.check)
        reading = tracked(rows, len(rows), f"reading {name}")
        decoded = inspection.read(shards, reading, len(rows), kind=kind, show=config.pictures)
        figures = {"split": name, "uri": uri} | inspection.figures(shards, decoded, kind)
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")
        _print(figures)
        if decoded.shown:
            sheet = contact_sheet([p for p, _ in decoded.shown], [text for _, text in decoded.shown])
            pictures.save_png(sheet, folder / f"{name}.png", {"data": uri, "digest": figures["digest"]})
            print(f"Contact sheet: {folder / f'{name}.png'}", flush=True)
        found.append(figures)
    return found


def contact_sheet(shown: list[np.ndarray], captions: list[str]) -> Image.Image:
    """Pictures, each whole in a cell of its own, with their captions cut to a few lines."""
    side = min(_CELL, max(max(pixels.shape[:2]) for pixels in shown))
    cells = []
    for pixels in shown:
        image = Image.fromarray(pixels)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        cell = Image.new("RGB", (side, side), (240, 240, 240))
        cell.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        cells.append(np.asarray(cell))
    cut = [text if len(text) <= _CAPTION else text[: _CAPTION - 1] + "…" for text in captions]
    return pictures.grid(cells, columns=8, captions=cut)


def _splits(uri: str) -> dict[str, str]:
    if store.exists(store.join(uri, manifest.NAME)):
        return {uri.rstrip("/").rsplit("/", 1)[-1]: uri}
    found = {name: store.join(uri, name) for name in SPLITS if store.exists(store.join(uri, name, manifest.NAME))}
    if not found:
        raise InputMissing(
            "There is no data set.", where=uri, mend="Give what build_shards or precompute_latents wrote."
        )
    return found


def _print(figures: Mapping[str, Any]) -> None:
    title = f"{figures['split']}: {figures['samples']:,} {figures['kind']}"
    table = Table("what", "figure", title=title)
    table.add_row("shards", f"{figures['shards']:,}, {figures['bytes'] / 2**20:,.1f} MiB")
    for name in ("samples_per_shard", "width", "height", "megapixels"):
        if name in figures:
            table.add_row(name.replace("_", " "), _shown(figures[name]))
    if "aspects" in figures:
        shown = "  ".join(f"{k}: {n:,}" for k, n in figures["aspects"].items() if n)
        table.add_row("width / height", shown)
    for row in _OF_KIND[figures["kind"]](figures):
        table.add_row(*row)
    if "exact_duplicates" in figures:
        table.add_row("exact duplicates", f"{figures['exact_duplicates']:,}")
    captions = figures.get("captions", {})
    for name in ("per_sample", "characters", "words"):
        if name in captions:
            table.add_row(f"captions: {name.replace('_', ' ')}", _shown(captions[name]))
    if captions:
        table.add_row("captions: distinct, empty", f"{captions['distinct_share']:.1%}, {captions['empty']:,}")
    table.add_row("checked, bad", f"{figures['checked']:,}, {len(figures['bad']):,}")
    console = Console(highlight=False)
    console.print(table)
    for one in figures["bad"][:10]:
        console.print(f"bad: {one['key']} in {one['shard']}: {one['what']}", markup=False, soft_wrap=True)


def _of_clips(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("frames", "fps", "seconds"):
        if name in figures:
            yield name, _shown(figures[name])


def _of_episodes(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "steps" in figures:
        yield "steps", _shown(figures["steps"])
    for name, held in figures.get("held", {}).items():
        yield name, ", ".join(f"{shape}: {count:,}" for shape, count in held["shapes"].items())
        if "low" in held:
            yield f"{name}: least", _numbers(held["low"])
            yield f"{name}: greatest", _numbers(held["high"])


def _of_latents(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "autoencoder", figures["autoencoder"]
    yield "text encoders", ", ".join(figures["text_encoders"]) or "none"
    yield "height x width", "  ".join(f"{shape}: {count:,}" for shape, count in figures["buckets"].items())
    if "frames" in figures:
        yield "frames, fps", f"{figures['frames']}, {figures['fps']:g}"
    if "latent_shapes" in figures:
        yield "latents", "  ".join(f"{shape}: {count:,}" for shape, count in figures["latent_shapes"].items())
        yield "mean by channel", _numbers(figures["latent_mean"])
        yield "std by channel", _numbers(figures["latent_std"])
        yield "posterior's std", _numbers(figures["posterior_std"])
        scale = figures["scale"]
        yield "the autoencoder's own", f"mean {scale['shift']:.3g}, std {1 / scale['scale']:.3g}"


_OF_KIND: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]]] = {
    kinds.PICTURES: lambda figures: iter(()),
    kinds.CLIPS: _of_clips,
    kinds.EPISODES: _of_episodes,
    kinds.LATENTS: _of_latents,
}
"""Kind -> rows of the table that are its own."""


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in values[:_MOST_NUMBERS])
    return shown if len(values) <= _MOST_NUMBERS else f"{shown}, ... ({len(values)})"


def _shown(spread: Mapping[str, float]) -> str:
    return f"{spread['min']:,.4g} to {spread['max']:,.4g}, median {spread['median']:,.4g}"
