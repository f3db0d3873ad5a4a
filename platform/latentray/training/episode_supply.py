"""Where a policy's actions come from: windows of episodes, normalised by the ranges of the data they were measured in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from latentray.checkpoint import store
from latentray.conditioning.observations import ACTIONS, OBS, Range
from latentray.config.train import Train
from latentray.data import episode_ranges
from latentray.data.episode_batches import episode_batches
from latentray.data.episodes import Episode
from latentray.data.pipeline import OrderedSource
from latentray.data.shards import IndexedShards
from latentray.errors import ConfigError, DataError
from latentray.models.autoencoder import LatentScale
from latentray.records import Conditions, EpisodeBatch, LatentBatch
from latentray.training.feed import Feed


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeSpace:
    """What a run's actions and observations are."""

    observations: tuple[str, ...]
    """Names of the vectors that the policy is told, side by side."""
    ranges: Mapping[str, Range]
    """Of `actions` and of each `obs.<name>`."""
    scale: LatentScale = dataclasses.field(default_factory=lambda: LatentScale(shift=0.0, scale=1.0))
    """None: actions are in [-1, 1] as they are read."""
    empty: Conditions = dataclasses.field(default_factory=Conditions)
    """Nothing: observations are never dropped."""

    @property
    def facts(self) -> dict[str, object]:
        """What the run's page and its model's manifest say of them."""
        told = {name: one.to_json() for name, one in self.ranges.items()}
        return {"observations": list(self.observations), "ranges": store.digest_of(told)}


class Episodes:
    """Episodes that build_shards wrote."""

    def __init__(self, config: Train, device: torch.device) -> None:
        self.feed = Feed.open(config)
        self.inputs = self.feed.inputs
        self.workers = config.loader_workers
        self.space = space_of(config, self.feed)

    def batches(self, source: OrderedSource) -> Iterator[EpisodeBatch]:
        return episode_batches(source, ranges=self.space.ranges, workers=self.workers)

    def latents(self, batch: EpisodeBatch) -> LatentBatch:
        """Actions as what is noised, observations as what is told; the loss counts no action that was made up."""
        seen = torch.cat([batch.observations[name] for name in self.space.observations], dim=-1)
        return LatentBatch(
            mean_BChw=batch.actions_BTA,
            logvar_BChw=None,
            given=Conditions(observations_BTD=seen),
            counts_B=batch.action_mask_BT[..., None],
            ids=batch.ids,
            weight_B=batch.weight_B,
            damaged=batch.damaged,
            traffic=batch.traffic,
        )


def space_of(config: Train, feed: Feed) -> EpisodeSpace:
    """The run's actions and observations, their ranges measured where that was not done before.

    Raises DataError where no episode can be read, ConfigError for a denoiser that does not fit them, for an observation that
    is not there, and for one that is no vector.
    """
    first = _first(feed.sets, skip_damaged=feed.skip_damaged)
    names = tuple(config.policy.observations or sorted(first.obs))
    _require_vectors(names, first)
    ranges = episode_ranges.of_sets(feed.sets, skip_damaged=feed.skip_damaged)
    net = config.denoiser
    seen = sum(first.obs[name].shape[1] for name in names)
    for key, have, want in (
        ("denoiser.in_channels", net.in_channels, first.actions_TA.shape[1]),
        ("denoiser.observation_width", net.observation_width, seen),
    ):
        if have != want:
            raise ConfigError(f"{key} is {have}, but the episodes have {want}.", where=key, mend=f"Set {key}={want}.")
    kept = (ACTIONS, *(f"{OBS}{name}" for name in names))
    return EpisodeSpace(observations=names, ranges={name: ranges[name] for name in kept})


def _first(sets: Sequence[IndexedShards], *, skip_damaged: bool) -> Episode:
    """The first episode that can be read: all others hold what it holds."""
    for opened in sets:
        for one in episode_ranges.readable(opened, skip_damaged=skip_damaged):
            return one
    raise DataError("No episode of the data set can be read.", where=sets[0].uri, mend="Restore its shards.")


def _require_vectors(names: Sequence[str], first: Episode) -> None:
    for name in names:
        if name not in first.obs:
            raise ConfigError(
                f"The episodes hold no observation {name!r}.",
                where="policy.observations",
                mend=f"They hold {', '.join(sorted(first.obs)) or 'none'}.",
            )
        values = first.obs[name]
        if values.ndim != 2 or values.dtype != np.float32:
            vectors = [n for n, v in sorted(first.obs.items()) if v.ndim == 2 and v.dtype == np.float32]
            raise ConfigError(
                f"The observation {name!r} is {values.dtype} {values.shape[1:]}: a policy is told float32 vectors, no pictures.",
                where="policy.observations",
                mend=f"Name the vectors: policy.observations=[{','.join(vectors)}].",
            )
