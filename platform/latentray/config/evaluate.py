"""Settings of `python -m jobs.evaluate`."""

from __future__ import annotations

import dataclasses

from latentray.errors import ConfigError

SUITES = ("standard", "failures", "clips", "policy")


@dataclasses.dataclass(kw_only=True)
class Evaluate:
    """Measure a model folder against a data set's validation pictures, or a policy in the built-in environment."""

    suite: str = "standard"
    """standard: the report that promotion reads. failures: the four known failures, each beside its remedy. clips, policy: that
    report for a model of clips, for a policy."""
    model: str | None = None
    """The model folder (of stage 2) or a release, a path or URI; or a pipeline's folder in diffusers' layout, or its hub id
    `owner/name`, with `@revision` behind it."""
    data: str | None = None
    """What build_shards wrote (train/ and validation/ below); a policy's scenes are built in."""
    out: str | None = None
    """Where the report goes; null is `report` beside the model, of one that others made runs/<its name>/report."""
    samples: int = 1024
    """Pictures drawn for FID and KID, with captions of the validation pictures."""
    heldout_samples: int = 512
    """Validation pictures in the held-out loss."""
    per_kind: int = 4
    """Shapes: pictures drawn of each of the 54 combinations."""
    per_unseen_kind: int = 16
    """Shapes: pictures drawn of each combination left out of training."""
    sampler: str | None = None
    """null takes the model's default, as for steps and guidance_scale."""
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 54
    inception: str | None = None
    """torch-fidelity's Inception weights file; null trains a small classifier on the data set at hand, once."""
    lpips_weights: str | None = None
    """suite=failures: torchvision's AlexNet state dict for LPIPS; null takes a random backbone, and the card says so."""
    episodes: int = 100
    """suite=policy: scenes that the policy is driven through."""
    executed: int | None = None
    """suite=policy: actions executed before it is asked again; null takes the model's own."""
    baseline: str | None = None
    """suite=policy: another policy, such as one trained with objective=regression, in the same scenes."""
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise ConfigError(f"There is no suite {self.suite!r}.", where="suite", mend=f"Known: {', '.join(SUITES)}.")
        for key in ("model",) if self.suite == "policy" else ("model", "data"):
            if not getattr(self, key):
                raise ConfigError("This setting is needed.", where=key, mend=f"Add {key}=<path or URI>.")
        for key in ("samples", "heldout_samples", "per_kind", "per_unseen_kind", "batch_size", "episodes"):
            if getattr(self, key) < 1:
                raise ConfigError("It must be at least 1.", where=key, mend=f"Raise {key}.")
