"""Settings of `python -m jobs.inspect_shards`."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError


@dataclasses.dataclass(kw_only=True)
class InspectShards:
    """Look at pictures, clips, episodes or latents: counts, sizes, captions, damaged samples, a contact sheet."""

    data: str | None = None
    """A data set or latents, path or URI: one split, or the folder above train/ and validation/."""
    check: int = 2000
    """Samples of each split that are read, checked against the index and decoded, spread evenly; 0 for all."""
    pictures: int = 40
    """Pictures, or middle frames, on the contact sheet."""
    out: str = "inspection"
    """Folder for `<split>.json` and `<split>.png`."""

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError(
                "This setting is needed.",
                where="data",
                mend="Add data=<what build_shards or precompute_latents wrote>.",
            )
        if self.check < 0:
            raise ConfigError("It must be 0 or more.", where="check", mend="Use 0 for all samples.")
        if self.pictures < 1:
            raise ConfigError("It must be at least 1.", where="pictures", mend="Raise pictures.")
