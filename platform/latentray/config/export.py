"""Settings of `python -m jobs.export`."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

STATES = ("ema", "weight")
TARGETS = ("weights", "diffusers", "single_file")


@dataclasses.dataclass(kw_only=True)
class Export:
    """Weights in a form that others read: no GPU, no cluster, whatever world wrote them."""

    run: str | None = None
    """A run's folder or URI: its newest valid checkpoint is taken. Or name one yourself:"""
    checkpoint: str | None = None
    """A checkpoint's folder or URI."""
    state: str = "ema"
    """Of a checkpoint: ema (what is promoted) or weight (what was averaged)."""
    pin: bool = True
    """Keep the checkpoint: retention does not remove it any more."""
    model: str | None = None
    """Or a model's or a release's folder, path or URI, or what others made: a folder in diffusers' layout, a single file, a hub
    id; with `registry`, an alias or a release id."""
    registry: str | None = None
    """The registry `model` is looked up in."""
    to: str = "weights"
    """weights (of a checkpoint: <network>.safetensors); of a model: diffusers (a folder that diffusers' pipelines load) or
    single_file (CompVis' layout of SD 1, SD 2 and SDXL, with its YAML)."""
    sampler: str | None = None
    """diffusers: whose scheduler the pipeline gets; null for the model's default sampler."""
    license: str | None = None
    """Of a model's card, in the hub's words, such as apache-2.0; null for the release's own."""
    base_model: str | None = None
    """Of a model's card: hub id of the model it was trained on from; null for the one it was imported from."""
    prompts: list[str] = dataclasses.field(default_factory=list)
    """Of a model's card: what the hub's page offers to draw."""
    out: str | None = None
    """Where the files and a manifest are written."""

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise ConfigError(f"There is no form {self.to!r}.", where="to", mend=f"Known: {', '.join(TARGETS)}.")
        if self.to == "weights":
            if self.model:
                raise ConfigError(
                    "A model is handed out in another library's layout.",
                    where="to",
                    mend="Add to=diffusers or to=single_file.",
                )
            if bool(self.run) == bool(self.checkpoint):
                raise ConfigError(
                    "One of run and checkpoint is needed.", where="run", mend="Add run=<folder or URI of the run>."
                )
        elif not self.model or self.run or self.checkpoint:
            raise ConfigError(
                f"{self.to} is made of a model or a release, not of a checkpoint.",
                where="model",
                mend="Give model=<folder, URI or alias> alone.",
            )
        if not self.out:
            raise ConfigError("This setting is needed.", where="out", mend="Add out=<path or URI>.")
        if self.state not in STATES:
            raise ConfigError(f"There is no state {self.state!r}.", where="state", mend=f"Known: {', '.join(STATES)}.")
