"""A training run's page: one self-contained HTML file, made from the lines of its metrics and what its folder tells.

Like the quickstart's page it loads nothing from anywhere, and it always comes out: what was not measured says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from PIL import Image

from latentray.reporting import curves, page
from latentray.reporting import lineage as lineage_graph
from latentray.reporting.progress import duration
from latentray.tracking import names
from latentray.training import run_figures
from latentray.training.run_figures import Records

STATES = {"finished": "pass", "stopped": "none", "failed": "miss"}
"""How a run ended -> the pill's colour."""

_CAUSES = {
    "steps": "steps that count",
    "faults": "restarts, and steps done again",
    "data": "waiting for data",
    "checkpoints": "saving checkpoints",
    "dropped": "dropped and rolled back steps",
    "other": "everything else",
}
_PLANNED = {
    "samples_per_second": "Samples per second",
    "peak_memory_bytes": "Peak memory of a worker",
    "hours": "Time in training",
    "checkpoint_bytes": "Size of a checkpoint",
}
_PICTURE_PIXELS = 1600
_CURVE_POINTS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Metrics that one picture shows together."""

    title: str
    metrics: dict[str, str]
    """Metric -> its label."""
    y_label: str = ""
    log_y: bool = False
    smooth: bool = True
    """False for what is exact as it stands."""


CHARTS = (
    Chart(title="Loss", metrics={names.TRAIN_LOSS: "loss"}, y_label="loss"),
    Chart(
        title="Autoencoder's terms",
        metrics={
            names.AUTOENCODER_RECONSTRUCTION: "reconstruction",
            names.AUTOENCODER_LPIPS: "LPIPS",
            names.AUTOENCODER_KL: "KL",
            names.AUTOENCODER_COMMITMENT: "commitment",
        },
        y_label="unweighted",
        log_y=True,
    ),
    Chart(
        title="Adversarial terms",
        metrics={names.AUTOENCODER_ADVERSARIAL: "autoencoder", names.DISCRIMINATOR_LOSS: "discriminator"},
        y_label="hinge loss",
    ),
    Chart(
        title="Discriminator's logits",
        metrics={names.DISCRIMINATOR_LOGITS_REAL: "real", names.DISCRIMINATOR_LOGITS_FAKE: "rebuilt"},
        y_label="mean logit",
    ),
    Chart(title="Adaptive weight", metrics={names.AUTOENCODER_ADAPTIVE_WEIGHT: "weight"}, log_y=True),
    Chart(title="Codebook's perplexity", metrics={names.CODEBOOK_PERPLEXITY: "perplexity"}, y_label="vectors"),
    Chart(title="Codebook in use", metrics={names.CODEBOOK_USAGE: "usage"}, y_label="share of its vectors"),
    Chart(
        title="Accuracy",
        metrics={names.CLASSIFIER_ACCURACY: "all noise levels"}
        | {names.accuracy_at(third): f"{third} third" for third in ("low", "middle", "high")},
        y_label="share of classes found",
    ),
    Chart(title="Learning rate", metrics={names.TRAIN_LEARNING_RATE: "learning rate"}, smooth=False),
    Chart(title="Gradient norm", metrics={names.TRAIN_GRADIENT_NORM: "norm"}, log_y=True),
    Chart(title="Throughput", metrics={names.TRAIN_SAMPLES_PER_SECOND: "samples/s"}, y_label="samples/s"),
)


def run_page(records: Records, about: Mapping[str, Any], pictures: Mapping[str, Image.Image]) -> str:
    """The whole page as HTML.

    Args:
        records: the lines of `metrics.jsonl`.
        about: `run`, `stage`, `state` (one of STATES), `total_samples`, `result` (a URI), `lineage`, `figures` (of the
            artifact), `plan` (`{"name", "planned", "actual"}` each), `commands` (`{"title", "command"}` each),
            `machine`, `notes`, `config`; any of them may be missing.
        pictures: name -> what the run drew.
    """
    graph = lineage_graph.nodes(about.get("lineage") or ())
    state = str(about.get("state") or "")
    return (
        page.environment()
        .get_template("run.html.j2")
        .render(
            run=about.get("run") or "unnamed run",
            stage=about.get("stage") or "",
            state={"word": state or "unknown", "colour": STATES.get(state, "none")},
            facts=_facts(records, about),
            result=about.get("result"),
            cards=_cards(records),
            time=_time(records),
            plan=[_beside(one) for one in about.get("plan") or ()],
            curves=[{"title": title, "uri": page.svg_uri(svg)} for title, svg in _curves(records).items()],
            pictures=[_picture(name, picture) for name, picture in pictures.items()],
            figures=_figures(records, about.get("figures") or {}),
            graph=graph,
            graph_wide=lineage_graph.svg(graph, vertical=False),
            graph_tall=lineage_graph.svg(graph, vertical=True),
            commands=list(about.get("commands") or ()),
            machine={str(key): str(value) for key, value in (about.get("machine") or {}).items()},
            notes=[str(note) for note in about.get("notes") or ()],
            config=page.config_text(about.get("config")),
        )
    )


def charts(records: Records) -> list[Chart]:
    """The charts that these lines fill: those of CHARTS, and what was measured on held-out data more than once."""
    measured = dict.fromkeys(name for record in records for name in record)
    at_timesteps = {
        name: name.rsplit("/", 1)[1] for name in measured if name.startswith(names.VALIDATION_LOSS + "_at/")
    }
    held_out = [
        Chart(title="Held-out loss", metrics={names.VALIDATION_LOSS: "loss"}),
        Chart(title="Held-out loss by timestep", metrics=at_timesteps),
        *(
            Chart(title=f"Held-out {_label(name)}", metrics={name: _label(name)})
            for name in measured
            if name.startswith("validation/") and name.count("/") == 1 and name != names.VALIDATION_LOSS
        ),
    ]
    drawn = [one for one in CHARTS if any(len(curves.series(records, name)[0]) for name in one.metrics)]
    return drawn + [one for one in held_out if any(len(curves.series(records, name)[0]) > 1 for name in one.metrics)]


def quantity(name: str, value: float | None) -> str:
    """A plan's or a card's quantity for a reader, by its name: bytes in GiB, hours as a duration."""
    if value is None:
        return "—"
    if name.endswith("bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"
    if name == "hours":
        return duration(value * 3600)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _facts(records: Records, about: Mapping[str, Any]) -> list[str]:
    """What stands beside the state: samples of how many, and how long it took."""
    found: list[str] = []
    total = page.number_at(about, "total_samples")
    if records:
        seen = int(records[-1]["samples"])
        found.append(f"{seen:,} of {int(total):,} samples" if total else f"{seen:,} samples")
    else:
        found.append("no step was logged")
    elapsed = run_figures.seconds(records)
    if elapsed is not None:
        found.append(f"{duration(elapsed)} from its first step to its last")
    return found


def _cards(records: Records) -> list[dict[str, str]]:
    loss, rate = run_figures.last(records, names.TRAIN_LOSS), names.TRAIN_SAMPLES_PER_SECOND
    waits, goodput = (
        run_figures.median(records, names.TRAIN_DATA_WAIT_SHARE),
        run_figures.last(records, names.RUN_GOODPUT),
    )
    stall = run_figures.over_attempts(records, names.CHECKPOINT_STALL_SECONDS)
    lowest = min(curves.series(records, names.TRAIN_LOSS)[1], default=None)
    return [
        _card("Last loss", quantity("", loss), "" if lowest is None else f"lowest {quantity('', lowest)}"),
        _card("Samples per second", quantity("", run_figures.median(records, rate)), "median"),
        _card("Waiting for data", _percent(waits), "median share of a step"),
        _card("Goodput", _percent(goodput), "of all time in steps that count"),
        _card(
            "Peak memory", quantity("bytes", run_figures.most(records, names.TRAIN_PEAK_MEMORY_BYTES)), "largest worker"
        ),
        _card("Stalled for checkpoints", "—" if stall is None else duration(stall), "all attempts"),
        _card("Restarts", quantity("", run_figures.most(records, names.RUN_RESTARTS)), "attempts after the first"),
        _card(
            "Dropped steps", quantity("", run_figures.over_attempts(records, names.TRAIN_DROPPED_STEPS)), "all attempts"
        ),
        _card("Rollbacks", quantity("", run_figures.over_attempts(records, names.TRAIN_ROLLBACKS)), "all attempts"),
    ]


def _card(label: str, value: str, foot: str) -> dict[str, str]:
    return {"label": label, "value": value, "foot": page.MISSING if value == "—" else foot}


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.1f} %"


def _time(records: Records) -> list[dict[str, Any]]:
    """Parts of one bar, each with its share, its colour and its name."""
    shares = run_figures.time_shares(records)
    scale = max(sum(shares.values()), 1e-9)
    colors = (curves.LINES[2], curves.LINES[4], curves.LINES[1], curves.LINES[0], curves.LINES[3], curves.INK)
    return [
        {"name": _CAUSES.get(name, name), "text": _percent(share), "width": 100 * share / scale, "color": color}
        for (name, share), color in zip(shares.items(), colors * (len(shares) // len(colors) + 1), strict=False)
    ]


def _beside(comparison: Mapping[str, Any]) -> dict[str, str]:
    name, planned, taken = str(comparison["name"]), float(comparison["planned"]), float(comparison["actual"])
    return {
        "name": _PLANNED.get(name, _label(name)),
        "planned": quantity(name, planned),
        "actual": quantity(name, taken),
        "ratio": f"{100 * taken / planned:.0f} %",
    }


def _curves(records: Records) -> dict[str, str]:
    return {
        chart.title: curves.curve(
            _thinned([record for record in records if chart.metrics.keys() & record.keys()]),
            chart.metrics,
            y_label=chart.y_label,
            log_y=chart.log_y,
            smooth=0.05 if chart.smooth else 0.0,
        )
        for chart in charts(records)
    }


def _thinned(records: Records) -> Records:
    """Not more lines than a picture can show; the last one always stays."""
    stride = -(-len(records) // _CURVE_POINTS)
    return records if stride <= 1 else records[::-stride][::-1]


def _picture(name: str, picture: Image.Image) -> dict[str, Any]:
    shown = picture.convert("RGB")
    shown.thumbnail((_PICTURE_PIXELS, 4 * _PICTURE_PIXELS))
    title = page.PICTURE_TITLES.get(name, _label(name).capitalize())
    return {"title": title, "uri": page.data_uri(shown), "w": shown.width}


def _figures(records: Records, figures: Mapping[str, Any]) -> dict[str, str]:
    """The artifact's figures, and the last of each that was measured on held-out data."""
    held_out = dict.fromkeys(n for record in records for n in record if n.startswith(("validation/", "latent/")))
    found = {_label(name): run_figures.last(records, name) for name in held_out}
    found |= {_label(name): page.number_at(figures, name) for name in figures}
    return {label: quantity("", value) for label, value in found.items() if value is not None}


def _label(name: str) -> str:
    """A metric's or a plan's name for a reader: `validation/psnr` is PSNR."""
    short = name.split("/", 1)[-1]
    if short in ("psnr", "ssim", "lpips", "fid", "kid"):
        return short.upper()
    return {"rfid": "rFID"}.get(short, short.replace("_", " ").replace("/", " "))
