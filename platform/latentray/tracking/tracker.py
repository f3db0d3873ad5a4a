"""What a tracker is, which ones a run gets, and the check a job makes before it starts anything."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentray.config.tracking import TrackingConfig
from latentray.errors import EnvironmentRefused
from latentray.tracking.jsonl import JsonlTracker
from latentray.tracking.wandb_tracker import WandbTracker, api_key, base_url, effective_mode

Picture = str | Path | np.ndarray
"""A PNG file's path, or uint8 RGB of shape (H, W, 3)."""


class Tracker(Protocol):
    """Records one run. No method blocks on a network, and none raises because a server is gone."""

    def log(self, samples: int, metrics: Mapping[str, float]) -> None:
        """Record metrics (names from `tracking.names`) at a count of samples seen."""

    def image(self, samples: int, name: str, picture: Picture, caption: str = "") -> None:
        """Record a picture; a file's content is taken at once, so the file may go afterwards."""

    def artifact(
        self, name: str, kind: str, uri: str, digest: str, inputs: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> None:
        """Record an artifact that this run made at `uri`: its manifest's digest, and its inputs' (role -> digest).

        The artifact's bytes stay where they are. A role is the input's kind; where two inputs are of one kind, a dot
        tells them apart: `dataset.validation`.
        """

    def finish(self) -> None:
        """Write out what is pending, within a bounded time. Calling it again does nothing."""

    @property
    def sync_command(self) -> str | None:
        """The command that uploads what was recorded offline; None where there is nothing to upload."""


def check(config: TrackingConfig) -> None:
    """Refuse online tracking without a key, before anything starts. Touches neither network nor `wandb`.

    Raises EnvironmentRefused.
    """
    if effective_mode(config) == "online" and api_key() is None:
        raise EnvironmentRefused(
            f"Tracking is set to online, but there is no W&B API key for {base_url()}.",
            where="tracking.mode",
            mend="Set WANDB_API_KEY (or run `wandb login`), or use tracking.mode=offline.",
        )


def open(
    config: TrackingConfig,
    run_id: str,
    run_folder: Path,
    resolved_config: Mapping[str, Any],
    *,
    resumed_at: int | None = None,
) -> Tracker:
    """The trackers of a run, as one. Call it in rank 0 only.

    Args:
        run_folder: a local folder; gets `metrics.jsonl`, `artifacts.jsonl`, `pictures/` and W&B's own `wandb/`.
        resolved_config: the whole configuration of the job, for W&B's config page.
        resumed_at: samples seen by the checkpoint that the run continues from. Lines after it, which the run will
            write again, are dropped from `metrics.jsonl`, and W&B gets those before it that it lacks. None finds the
            point by the first line logged.
    """
    trackers: list[Tracker] = [JsonlTracker(run_folder, resumed_at=resumed_at)]
    if effective_mode(config) != "disabled":
        trackers.append(WandbTracker(config, run_id, run_folder, resolved_config, resumed_at=resumed_at))
    return _Several(trackers)


class _Several:
    """Hands every call to each tracker; `metrics.jsonl` comes first, so it has what any other lost."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def log(self, samples: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(samples, metrics)

    def image(self, samples: int, name: str, picture: Picture, caption: str = "") -> None:
        for tracker in self._trackers:
            tracker.image(samples, name, picture, caption)

    def artifact(
        self, name: str, kind: str, uri: str, digest: str, inputs: Mapping[str, str], metadata: Mapping[str, Any]
    ) -> None:
        for tracker in self._trackers:
            tracker.artifact(name, kind, uri, digest, inputs, metadata)

    def finish(self) -> None:
        with contextlib.ExitStack() as stack:  # one that fails does not keep the others from finishing
            for tracker in self._trackers:
                stack.callback(tracker.finish)

    @property
    def sync_command(self) -> str | None:
        commands = [tracker.sync_command for tracker in self._trackers]
        return next((command for command in commands if command), None)
