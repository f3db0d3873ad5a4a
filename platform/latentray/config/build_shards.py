"""Settings of `python -m jobs.build_shards`."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

SOURCES = ("folder", "table", "shapes")


@dataclasses.dataclass(kw_only=True)
class SourceConfig:
    """Where pictures and captions come from."""

    name: str = "shapes"
    """`folder` (pictures with `.txt` beside them), `table` (CSV, JSONL or Parquet) or `shapes` (drawn)."""
    path: str | None = None
    """The folder or the table, a path or URI; the job's `path=` sets it."""
    path_column: str = "path"
    """Table: the column of picture paths (relative to the table) or URIs."""
    caption_column: str = "caption"
    """Table: the column of captions."""
    n: int = 10200
    """Shapes: training pictures, of the 51 combinations that are not left out."""
    n_validation: int = 432
    """Shapes: validation pictures, of all 54 combinations."""

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ConfigError(
                f"There is no source {self.name!r}.", where="source.name", mend=f"Known: {', '.join(SOURCES)}."
            )
        if self.name != "shapes" and not self.path:
            raise ConfigError(
                f"source={self.name} needs to know where the pictures are.",
                where="path",
                mend="Add path=<folder or table>.",
            )
        for key in ("n", "n_validation"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    "At least one picture is needed.", where=f"source.{key}", mend=f"Set source.{key}=1 or more."
                )


@dataclasses.dataclass(kw_only=True)
class BuildShards:
    """Pack pictures with captions into an indexed data set."""

    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    path: str | None = None
    """The user's pictures: a folder, or a table."""
    out: str = "runs/data/shapes"
    """Where `train` and `validation` are written, a path or URI."""
    samples_per_shard: int = 512
    """Pictures in one tar."""
    max_bad_fraction: float = 0.01
    """The job fails where a greater share of the pictures is rejected."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels are rejected before they are decoded."""
    validation_fraction: float = 0.02
    """Folder and table: the share kept for validation, chosen by a hash of each picture's name."""
    seed: int = 0
    """Seed of the drawn pictures and of the choice for validation."""
    address: str | None = None
    """A running Ray cluster (`auto`, or host:port); none starts one on this machine."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ConfigError(
                "A shard holds at least one picture.", where="samples_per_shard", mend="Set it to 1 or more, 512 say."
            )
        for key, below in (("max_bad_fraction", 1.0), ("validation_fraction", 0.999)):
            if not 0 <= getattr(self, key) <= below:
                raise ConfigError(
                    f"It lies outside 0 ... {below}.", where=key, mend=f"Set {key} between 0 and {below}."
                )
        if self.max_pixels < 1:
            raise ConfigError(
                "The pixel limit lets nothing through.", where="max_pixels", mend="Set it to 64000000, say."
            )
        if not self.out:
            raise ConfigError("The result needs a place.", where="out", mend="Set out=<path or URI>.")
