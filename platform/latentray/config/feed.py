"""How a run reads its data: order, mixture, damage."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

POLICIES = ("fail", "skip")
UNITS = ("samples", "epochs")
CROPS = ("centre", "random")


@dataclasses.dataclass(kw_only=True)
class OrderConfig:
    """In which order samples are read: fixed when a run begins."""

    chunk: int | None = None
    """Neighbouring samples that are read together; null is 1 for local data, a full shuffle, and 8 MiB for remote data."""
    depth: int = 16
    """With chunk > 1: chunks that are mixed at a time."""
    streams: int | None = None
    """With chunk > 1: places in the data that are read side by side; a divisor of global_batch_size, null for that itself."""
    drop_remainder: bool = False
    """Leave out what does not fill an epoch's last batch, instead of carrying it into the next epoch."""

    def __post_init__(self) -> None:
        for key in ("chunk", "depth", "streams"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError("It must be at least 1.", where=f"order.{key}", mend=f"Raise order.{key}.")


@dataclasses.dataclass(kw_only=True)
class BucketsConfig:
    """Pictures, or latents, of several aspect ratios and resolutions in one run, each batch of one shape."""

    sizes: list[int] = dataclasses.field(default_factory=list)
    """Resolutions, as sides of squares in pixels; none trains on squares of `size`. Stored latents have shapes already."""
    step: int = 64
    """Heights and widths are multiples of it, and it of the autoencoder's downsampling."""
    max_aspect: float = 2.0
    """The longest side is at most so many times the shortest."""
    multiple: int = 24
    """A batch size is a multiple of it, of stored latents in buckets too; workers times micro-batches must divide it."""

    def __post_init__(self) -> None:
        for key in ("step", "multiple"):
            if getattr(self, key) < 1:
                raise ConfigError("It must be at least 1.", where=f"buckets.{key}", mend=f"Raise buckets.{key}.")
        if self.max_aspect < 1:
            raise ConfigError(
                "An aspect ratio of long to short is at least 1.", where="buckets.max_aspect", mend="Set it to 2, say."
            )
        if any(size < self.step for size in self.sizes):
            raise ConfigError(
                "A size is smaller than the step.", where="buckets.sizes", mend="Lower buckets.step or raise the size."
            )


@dataclasses.dataclass(kw_only=True)
class FetchConfig:
    """How shards in an object store are read."""

    cache_bytes: int = 64 << 30
    """The most that each node keeps of them on its disk ($LATENTRAY_CACHE); what was used last goes last."""
    budget_s: float = 120.0
    """How long a range is tried for, with growing and jittered pauses, before the run ends."""
    read_ahead: int = 4
    """Steps whose samples are fetched before they are wanted."""

    def __post_init__(self) -> None:
        if self.cache_bytes < 64 << 20:
            raise ConfigError("The cache is too small.", where="fetch.cache_bytes", mend="Give it 67108864 or more.")
        if self.budget_s < 0 or self.read_ahead < 0:
            raise ConfigError("It must be 0 or more.", where="fetch.budget_s, fetch.read_ahead", mend="Raise it.")


@dataclasses.dataclass(kw_only=True)
class DamageConfig:
    """What becomes of samples that cannot be read or decoded."""

    policy: str = "fail"
    """fail: the run ends, naming the shard. skip: the sample counts as nothing, and is counted."""
    max_bad_fraction: float = 0.001
    """With skip: the run ends where more than this share of the data was found damaged."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(
                f"There is no policy {self.policy!r}.", where="damage.policy", mend=f"Known: {', '.join(POLICIES)}."
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError("It lies outside 0 ... 1.", where="damage.max_bad_fraction", mend="Set it to 0.001, say.")


@dataclasses.dataclass(kw_only=True)
class Ingredient:
    """One data set of a mixture."""

    uri: str
    """What build_shards (stage 1) or precompute_latents (stage 2) wrote."""
    weight: float = 1.0
    """How much of it, in proportion to the others."""


@dataclasses.dataclass(kw_only=True)
class MixtureConfig:
    """Several data sets in one run, instead of `data` or `latents`."""

    of: list[Ingredient] = dataclasses.field(default_factory=list)
    """The data sets and their weights; weights may change when a run is resumed."""
    by: str = "samples"
    """What weights are shares of: samples (1 and 3: every fourth is of the first) or epochs (2: gone through twice as often)."""

    def __post_init__(self) -> None:
        if self.by not in UNITS:
            raise ConfigError(
                f"Weights are not by {self.by!r}.", where="mixture.by", mend=f"Known: {', '.join(UNITS)}."
            )
        for number, one in enumerate(self.of):
            if not one.weight > 0:
                raise ConfigError(
                    f"A weight of {one.weight!r} would never draw from the data set.",
                    where=f"mixture.of[{number}].weight",
                    mend="Give a positive weight, or leave the data set out.",
                )
        if len({one.uri for one in self.of}) < len(self.of):
            raise ConfigError("A data set is named twice.", where="mixture.of", mend="Name it once, with its weight.")
