"""The quickstart's end: `report.json` with the figures, and `report.html` with the pictures."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs.quickstart_client import Drawn
from latentray.checkpoint import manifest
from latentray.config import compose
from latentray.config.quickstart import Quickstart
from latentray.data import synthetic
from latentray.evaluation import pixel_checker
from latentray.reporting import curves, page, pictures
from latentray.tracking import names

TARGETS = {
    "autoencoder": {"psnr": 24.0},
    "samples": {
        "color_accuracy": 0.90,
        "background_accuracy": 0.95,
        "shape_accuracy": 0.75,
        "heldout_color_accuracy": 0.75,
    },
    "total_seconds": 720,
}
_GRID = "samples.png"


def write(
    out: Path,
    config: Quickstart,
    drawn: Sequence[Drawn],
    *,
    release: str,
    timings: Mapping[str, float],
    total_seconds: float,
    began: float,
) -> Path:
    """Write `report.json`, `report.html` and the grid of all captions below `out`; the page's path."""
    autoencoder = manifest.read(str(out / "autoencoder" / "autoencoder"))
    report: dict[str, Any] = {
        "autoencoder": autoencoder.meta["figures"],
        "samples": sample_figures(drawn),
        "release": {"id": release, "alias": "production"},
        "lineage": lineage(out, release),
        "targets": TARGETS if config.scale.name == "full" else {},
        "commands": [{"title": "", "command": command} for command in next_commands(str(out), config.serve.port)],
        "machine": machine(),
        "notes": _notes(autoencoder.meta),
        "config": compose.to_dict(config),
    }
    shown: dict[str, Image.Image] = {
        "reconstructions": Image.open(out / "autoencoder" / "autoencoder" / "reconstructions.png")
    }
    shown |= {f"{page.SAMPLE_PREFIX}{caption}": grid for caption, grid in caption_grids(drawn).items()}
    first: dict[synthetic.Kind, np.ndarray] = {}
    for one in drawn:
        first.setdefault(one.kind, one.pixels)
    labels = [synthetic.caption(kind) for kind in first]
    unseen = [i for i, kind in enumerate(first) if kind in synthetic.UNSEEN]
    grid = pictures.grid(list(first.values()), columns=9, captions=labels, marked=unseen)
    pictures.save_png(grid, out / _GRID, {"release": release, "steps": str(config.scale.steps)})
    drawings = loss_curves(out)
    elapsed = time.time() - began
    report["timings"] = {name: round(seconds, 1) for name, seconds in {**timings, "report": elapsed}.items()}
    report["total_seconds"] = round(total_seconds + elapsed, 1)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    target = out / "report.html"
    target.write_text(page.quickstart_page(report, shown, drawings), encoding="utf-8")
    return target


def sample_figures(drawn: Sequence[Drawn]) -> dict[str, Any]:
    """Accuracies of the pictures that came over HTTP, by the pixel checker."""
    grid = [d for d in drawn if not d.extra]
    unseen = [d for d in drawn if d.extra]
    figures: dict[str, Any] = {}
    for what, value in pixel_checker.accuracy([d.pixels for d in grid], [d.kind for d in grid]).items():
        figures[f"{what}_accuracy"] = round(value, 4)
    for what, value in pixel_checker.accuracy([d.pixels for d in unseen], [d.kind for d in unseen]).items():
        figures[f"heldout_{what}_accuracy"] = round(value, 4)
    counts = {"pictures": len(grid), "heldout_pictures": len(unseen)}
    return figures | counts | {"heldout": [synthetic.caption(kind) for kind in synthetic.UNSEEN]}


def caption_grids(drawn: Sequence[Drawn]) -> dict[str, Image.Image]:
    """The pictures of each caption side by side."""
    by_caption: dict[str, list[Any]] = {}
    for one in drawn:
        if not one.extra:
            by_caption.setdefault(synthetic.caption(one.kind), []).append(one.pixels)
    return {caption: pictures.grid(some, columns=min(len(some), 2)) for caption, some in by_caption.items()}


def loss_curves(out: Path) -> dict[str, str]:
    """SVG curves of both stages."""
    first = curves.parse((out / "autoencoder" / "metrics.jsonl").read_text())
    second = curves.parse((out / "denoiser" / "metrics.jsonl").read_text())
    return {
        "Autoencoder": curves.curve(
            first,
            {names.AUTOENCODER_RECONSTRUCTION: "reconstruction (L1)", names.AUTOENCODER_LPIPS: "LPIPS"},
            title="Autoencoder",
            y_label="loss",
            log_y=True,
        ),
        "Denoiser": curves.curve(
            second, {names.TRAIN_LOSS: "squared error"}, title="Denoiser", y_label="loss", log_y=True
        ),
    }


def lineage(out: Path, release: str) -> list[dict[str, Any]]:
    """Every artifact from shards to release: role, kind, URI, digest and its inputs' digests."""
    folders = {
        "dataset": out / "data" / "train",
        "validation": out / "data" / "validation",
        "autoencoder": out / "autoencoder" / "autoencoder",
        "text_encoder": out / "text_encoder",
        "latents": out / "latents" / "train",
        "model": out / "denoiser" / "model",
        "report": out / "evaluation",
        "release": out / "registry" / "releases" / release,
    }
    found = {role: manifest.read(str(folder)) for role, folder in folders.items()}
    nodes = [
        {"role": role, "kind": one.kind, "uri": str(folders[role]), "digest": one.digest, "inputs": dict(one.inputs)}
        for role, one in found.items()
    ]
    shards = {name: entry.sha256 for name, entry in found["dataset"].files.items() if name.endswith(".tar")}
    nodes[0]["shards"] = shards
    return nodes


def next_commands(out: str, port: int) -> list[str]:
    """The three commands a user would type next."""
    return [
        f"python -m jobs.serve registry={out}/registry port={port} allow_anonymous=true",
        f"python -m jobs.train experiment=shapes_diffusion latents={out}/latents total_samples=200000",
        "python -m jobs.build_shards source=folder path=<your pictures> out=runs/data/mine",
    ]


def machine() -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "processors": str(os.cpu_count()),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _notes(meta: Mapping[str, Any]) -> list[str]:
    backbone = meta.get("lpips_backbone", {})
    notes = [f"Feature network of rFID, FID and KID: {meta['feature_network']['name']}."]
    if backbone.get("source") == "random":
        notes.append(f"LPIPS has a random {backbone['net']} backbone ({backbone['detail']}).")
    return notes
