"""Settings of `python -m jobs.build_shards`."""

from __future__ import annotations

import dataclasses
from typing import Any

from latentray.errors import ConfigError

DRAWN = ("shapes", "moving_shapes", "gate")
"""Sources that are drawn: pictures, clips and episodes to try things on."""
SOURCES = ("folder", "table", "webdataset", *DRAWN)
DUPLICATES = ("none", "exact", "near")
JOINS = ("key", "name", "sha256")
FORMS = ("frames", "mp4")
MAX_NEAR_DISTANCE = 7


@dataclasses.dataclass(kw_only=True)
class SourceConfig:
    """Where pictures and captions come from."""

    name: str = "shapes"
    """`folder` (pictures with `.txt` beside them), `table` (CSV, JSONL or Parquet), `webdataset` (tars); or drawn: `shapes`
    (pictures), `moving_shapes` (clips), `gate` (episodes of a scripted expert)."""
    path: str | None = None
    """The folder, the table or the tars, a path or URI; the job's `path=` sets it."""
    path_column: str = "path"
    """Table: the column of picture paths (relative to the table) or URIs."""
    caption_column: str = "caption"
    """Table, and the table of `captions`: the column of captions."""
    captions: str | None = None
    """WebDataset: a table (CSV, JSONL or Parquet) whose captions replace those in the tars; a key may have several rows."""
    join: str = "key"
    """WebDataset: what joins `captions`: a column `key` (as in the tar), `name` (tar/key) or `sha256` (of the picture, hex)."""
    label: str | None = None
    """Where class labels are. Table: the column. WebDataset: the key of the `.json`; null is `label`, and a `.cls` beside it is
    read too. Folder: `folder`, and then each folder directly below `path` is a class, numbered in the order of their names."""
    index_only: bool = False
    """WebDataset: leave the tars where they are, and write only an index of them."""
    n: int = 10200
    """Drawn: training samples; of shapes, of the 51 combinations that are not left out."""
    n_validation: int = 432
    """Drawn: validation samples; of shapes, of all 54 combinations."""
    frames: int = 16
    """Moving shapes: frames of a clip."""
    fps: float = 8.0
    """Moving shapes: frames per second."""
    form: str = "frames"
    """Moving shapes: how a clip is stored, `frames` (whole) or `mp4`."""

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ConfigError(
                f"There is no source {self.name!r}.", where="source.name", mend=f"Known: {', '.join(SOURCES)}."
            )
        if self.name not in DRAWN and not self.path:
            raise ConfigError(
                f"source={self.name} needs to know where the pictures are.",
                where="path",
                mend="Add path=<folder, table or tars>.",
            )
        for key in ("n", "n_validation", "frames"):
            if getattr(self, key) < 1:
                raise ConfigError("At least one is needed.", where=f"source.{key}", mend=f"Set source.{key}=1 or more.")
        if not self.fps > 0:
            raise ConfigError("It must be positive.", where="source.fps", mend="Set source.fps=8, say.")
        if self.form not in FORMS:
            raise ConfigError(
                f"There is no form {self.form!r}.", where="source.form", mend=f"Known: {', '.join(FORMS)}."
            )
        self._check_webdataset()

        if self.name == "folder" and self.label not in (None, "folder"):
            raise ConfigError(
                "In a folder, folders are classes.",
                where="source.label",
                mend="Set source.label=folder, or leave it out.",
            )

    def _check_webdataset(self) -> None:
        for key in ("index_only", "captions"):
            if getattr(self, key) and self.name != "webdataset":
                raise ConfigError(
                    f"Only source=webdataset takes {key}.",
                    where=f"source.{key}",
                    mend=f"Set source=webdataset, or leave source.{key} out.",
                )
        if self.index_only and self.captions:
            raise ConfigError(
                "An index cannot change the captions in the tars.",
                where="source.captions",
                mend="Leave source.index_only out: the samples are then written anew, with these captions.",
            )
        if self.join not in JOINS:
            raise ConfigError(
                f"Captions cannot be joined by {self.join!r}.",
                where="source.join",
                mend=f"Known: {', '.join(JOINS)}.",
            )


@dataclasses.dataclass(kw_only=True)
class FilterConfig:
    """Which samples are taken. A bound that is null is none; what is filtered is counted, and is not bad."""

    min_side: int | None = None
    """The shorter side, in pixels, is at least this."""
    max_side: int | None = None
    """The longer side, in pixels, is at most this."""
    min_pixels: int | None = None
    """Width times height is at least this."""
    aspect: list[Any] | None = None
    """[least, greatest] width over height."""
    caption_length: list[Any] | None = None
    """[least, greatest] number of characters of the first caption."""
    scores: dict[str, Any] | None = None
    """Bounds of numbers in the table or the `.json`: {aesthetic: [5.0, null], pwatermark: [null, 0.8]}."""
    where: str | None = None
    """A condition on them, such as "'cat' in lower(caption) and width > 2 * height"."""

    def __post_init__(self) -> None:
        for key in ("min_side", "max_side", "min_pixels"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError("It must be at least 1.", where=f"filter.{key}", mend="Raise it, or leave it null.")
        if self.min_side and self.max_side and self.min_side > self.max_side:
            raise ConfigError(
                "No picture's shorter side exceeds its longer side.",
                where="filter.min_side",
                mend="Set it to at most filter.max_side.",
            )
        for key in ("aspect", "caption_length"):
            if getattr(self, key) is not None:
                _check_bounds(getattr(self, key), f"filter.{key}")
        for name, bounds in (self.scores or {}).items():
            _check_bounds(bounds, f"filter.scores.{name}")

    @property
    def by_size(self) -> bool:
        """Whether a picture's size is asked for."""
        return any(value is not None for value in (self.min_side, self.max_side, self.min_pixels, self.aspect))


def _check_bounds(bounds: Any, where: str) -> None:
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(map(_is_bound, bounds)):
        raise ConfigError("Bounds are [least, greatest].", where=where, mend=f"Give two: {where}=[1,2] or [1,null].")
    least, greatest = bounds
    if least is not None and greatest is not None and least > greatest:
        raise ConfigError(f"Nothing lies between {least:g} and {greatest:g}.", where=where, mend="Swap the two.")


def _is_bound(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


@dataclasses.dataclass(kw_only=True)
class BuildShards:
    """Pack pictures with captions into an indexed data set."""

    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    path: str | None = None
    """The user's pictures: a folder, a table, or tars (a folder of them, one, or a pattern such as 'laion/*.tar')."""
    out: str | None = None
    """Where `train` and `validation` are written, a path or URI; null is runs/data/<source>, and beside the tars with
    source.index_only."""
    filter: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    duplicates: str = "none"
    """`exact` leaves out pictures of the same bytes as an earlier one, `near` also those that look the same; both read the
    input once more."""
    near_distance: int = 3
    """With duplicates=near: how many of the 64 bits of two pictures' perceptual hashes may differ."""
    samples_per_shard: int = 512
    """Most pictures in one tar."""
    shard_bytes: int = 268_435_456
    """Most bytes of input in one tar, 256 MiB; a larger picture has a tar of its own. Pictures of a remote folder, or remote
    ones of a table, are counted only where duplicates or a size are asked for: their sizes are not known before."""
    max_bad_fraction: float = 0.01
    """The job fails where a greater share of the pictures is rejected."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels are rejected before they are decoded."""
    validation_fraction: float = 0.02
    """All but shapes: the share kept for validation, chosen by a hash of each picture's name."""
    seed: int = 0
    """Seed of the drawn pictures and of the choice for validation."""
    address: str | None = None
    """A running Ray cluster (`auto`, or host:port); none starts one on this machine."""

    def __post_init__(self) -> None:
        for key in ("samples_per_shard", "shard_bytes"):
            if getattr(self, key) < 1:
                raise ConfigError(
                    "A shard holds at least one picture.", where=key, mend="Set it to 1 or more, or leave it out."
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
        if self.duplicates not in DUPLICATES:
            raise ConfigError(
                f"Duplicates cannot be {self.duplicates!r}.",
                where="duplicates",
                mend=f"Known: {', '.join(DUPLICATES)}.",
            )
        if not 0 <= self.near_distance <= MAX_NEAR_DISTANCE:
            raise ConfigError(
                f"It lies outside 0 ... {MAX_NEAR_DISTANCE}.",
                where="near_distance",
                mend="Set it to 3, say: beyond 7 of 64 bits, pictures that differ look alike.",
            )
        if self.out == "":
            raise ConfigError("The result needs a place.", where="out", mend="Set out=<path or URI>.")
        if self.source.name in DRAWN and (self.filter != FilterConfig() or self.duplicates != "none"):
            raise ConfigError(
                "The drawn pictures are all taken.",
                where="filter" if self.filter != FilterConfig() else "duplicates",
                mend="Leave it out, or choose another source.",
            )
