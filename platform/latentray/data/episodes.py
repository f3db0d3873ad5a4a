"""Episodes of observations and actions: records, windows for policies, and the ranges they are normalised by.

Suffixes: T steps of an episode, A dimensions of an action, D of a vector; To and Tp are the horizons of observation and
prediction of Chi et al. 2023, "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", section II.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from latentray.conditioning.observations import ACTIONS, OBS, Range
from latentray.data import shards
from latentray.data.lines import Ints
from latentray.errors import ConfigError, DataError, SampleRejected

EPISODE_MEMBER = "episode.safetensors"
_OBS_DTYPES = ("float32", "uint8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode: actions[t] was taken on seeing obs[...][t]."""

    actions_TA: np.ndarray
    """float32."""
    obs: dict[str, np.ndarray]
    """Name -> (T, ...): float32, or uint8 for pictures (T, H, W, 3)."""
    meta: dict[str, Any]

    @property
    def steps(self) -> int:
        return len(self.actions_TA)


def read_episode(decoded: Mapping[str, Any]) -> Episode:
    """The episode of a sample that `members.decode_sample` decoded.

    Raises DataError where the sample is no episode, SampleRejected as `check` does.
    """
    where = f"{decoded.get('__url__', '')} {decoded.get('__key__', '')}".strip()
    if EPISODE_MEMBER not in decoded:
        raise DataError(
            f"The sample {decoded.get('__key__')!r} has no episode.",
            where=str(decoded.get("__url__", "")),
            mend=f"Give a data set of episodes: .{EPISODE_MEMBER}.",
        )
    return check(decoded[EPISODE_MEMBER], meta=decoded.get("json") or {}, where=where)


def check(tensors: Mapping[str, Any], *, meta: Mapping[str, Any] | None = None, where: str = "") -> Episode:
    """An episode from its named tensors (of torch or numpy).

    Raises SampleRejected with reason `tensors` (no actions, or a name that is neither them nor `obs.<name>`), `dtype`,
    `shape` (actions that are not (T, A), no step), `length` (unequal T) or `not_finite`.
    """
    strange = [name for name in tensors if name != ACTIONS and not name.startswith(OBS)]
    if ACTIONS not in tensors or strange:
        raise SampleRejected(
            "tensors", f"An episode holds `actions` and `obs.<name>`; this one: {', '.join(tensors)}.", where=where
        )
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in (_OBS_DTYPES if name != ACTIONS else ("float32",)):
            raise SampleRejected("dtype", f"{name} is {dtype}: actions are float32, obs that or uint8.", where=where)
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    actions = arrays.pop(ACTIONS)
    if actions.ndim != 2 or not actions.size:
        raise SampleRejected("shape", f"Actions are (T, A); these are {actions.shape}.", where=where)
    for name, array in arrays.items():
        if not array.ndim or len(array) != len(actions):
            raise SampleRejected(
                "length", f"{name} has the shape {array.shape}; there are {len(actions)} actions.", where=where
            )
    for name, array in ((ACTIONS, actions), *arrays.items()):
        if array.dtype == np.float32 and not np.isfinite(array).all():
            step = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise SampleRejected("not_finite", f"{name} is not finite at step {step}.", where=where)
    obs = {name.removeprefix(OBS): array for name, array in arrays.items()}
    return Episode(actions_TA=actions, obs=obs, meta=dict(meta or {}))


def episode_sample(
    key: str, actions_TA: np.ndarray, obs: Mapping[str, np.ndarray], meta: Mapping[str, Any] | None = None
) -> shards.Sample:
    """An episode as a sample to be written, checked as it will be when it is read.

    Its column of the index is `steps`: `length` is the index's own, of bytes.
    """
    arrays = {ACTIONS: actions_TA} | {f"{OBS}{name}": array for name, array in obs.items()}
    steps = check(arrays, where=key).steps
    data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    digest = hashlib.sha256(data)
    record = {**(meta or {}), "steps": steps, "sha256": digest.hexdigest()}
    return shards.Sample(
        key=key,
        members={EPISODE_MEMBER: data, "json": json.dumps(record, sort_keys=True, ensure_ascii=False).encode()},
        columns={"sha256": digest.digest(), "steps": steps},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Horizon:
    """What a policy sees and predicts at step t: o_(t-To+1) ... o_t, and a_t ... a_(t+Tp-1).

    So the first action belongs to the last observation, and an agent executes actions[:Ta] before it asks again. (Chi et
    al.'s code predicts a_(t-To+1) ... a_(t-To+Tp) and executes from entry To-1 on: of those the first To-1 are past.)
    """

    observations: int
    """To."""
    actions: int
    """Tp."""
    pad_before: int | None = None
    """Most observations made up before an episode's first; null for To - 1: every first step has its window."""
    pad_after: int | None = None
    """Most actions made up after an episode's last; null for Tp - 1: every last step has its window. Chi et al. take
    Ta - 1."""

    def __post_init__(self) -> None:
        if self.observations < 1 or self.actions < 1:
            raise ConfigError(
                f"The horizons are {self.observations} and {self.actions}.",
                where="horizon",
                mend="Set both to 1 or more.",
            )
        for name, most in (("pad_before", self.observations - 1), ("pad_after", self.actions - 1)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ConfigError(
                    f"{name} is {value}.", where=f"horizon.{name}", mend=f"Set it to 0 ... {most}, or null for {most}."
                )

    @property
    def first(self) -> int:
        """The first step t that has a window."""
        return 0 if self.pad_before is None else self.observations - 1 - self.pad_before

    @property
    def tail(self) -> int:
        """How many last steps have none."""
        return 0 if self.pad_after is None else self.actions - 1 - self.pad_after

    def counts(self, steps_N: npt.ArrayLike) -> Ints:
        """Windows of episodes of so many steps, (N,): T - (To - 1 - pad_before) - (Tp - 1 - pad_after), 0 at least."""
        return np.maximum(np.asarray(steps_N, np.int64) - self.first - self.tail, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeWindow:
    """What a policy learns from at one step."""

    obs: dict[str, np.ndarray]
    """Name -> (To, ...); before an episode's begin, its first observation."""
    actions: np.ndarray
    """(Tp, A); after an episode's end, its last action."""
    observation_mask: np.ndarray
    """(To,) bool: False where made up."""
    action_mask: np.ndarray
    """(Tp,) bool: False where made up."""
    start: int
    """t: the step of the last observation and of the first action."""


def window(episode: Episode, start: int, horizon: Horizon) -> EpisodeWindow:
    """The window of an episode at step `start`."""
    assert 0 <= start < episode.steps, f"step {start} of {episode.steps}"
    seen = np.arange(start - horizon.observations + 1, start + 1)
    ahead = np.arange(start, start + horizon.actions)
    return EpisodeWindow(
        obs={name: values[np.maximum(seen, 0)] for name, values in episode.obs.items()},
        actions=episode.actions_TA[np.minimum(ahead, episode.steps - 1)],
        observation_mask=seen >= 0,
        action_mask=ahead < episode.steps,
        start=start,
    )


@dataclasses.dataclass(frozen=True)
class WindowSet:
    """All windows of a data set of episodes, by a flat position: what an order of training permutes."""

    steps_N: npt.ArrayLike
    """Steps of each episode: the index's column `steps`."""
    horizon: Horizon

    @functools.cached_property
    def _first(self) -> Ints:
        """Position of each episode's first window; one more, the count, at the end."""
        return np.concatenate([[0], np.cumsum(self.horizon.counts(self.steps_N))]).astype(np.int64)

    @property
    def count(self) -> int:
        return int(self._first[-1])

    def locate(self, position: npt.ArrayLike) -> tuple[Ints, Ints]:
        """Flat positions (K,) -> the episode and the start t of each, int64 (K,)."""
        flat = np.asarray(position, np.int64)
        episode = np.searchsorted(self._first, flat, side="right") - 1
        return episode, flat - self._first[episode] + self.horizon.first

    def position(self, episode: npt.ArrayLike, start: npt.ArrayLike) -> Ints:
        """The inverse of `locate`."""
        return self._first[np.asarray(episode, np.int64)] + np.asarray(start, np.int64) - self.horizon.first


def ranges(episodes: Iterable[Episode]) -> dict[str, Range]:
    """The ranges of `actions` and of each vector observation (T, D), over all episodes, reading each once.

    Pictures are not among them: theirs is [0, 255]. Raises DataError where there is no episode, or where episodes differ in
    what they hold.
    """
    total: dict[str, Range] = {}
    for number, episode in enumerate(episodes):
        found = {ACTIONS: Range.of(episode.actions_TA)}
        for name, values in episode.obs.items():
            if values.ndim == 2 and values.dtype == np.float32:
                found[f"{OBS}{name}"] = Range.of(values)
        shapes = {name: one.low.shape for name, one in found.items()}
        if total and shapes != {name: one.low.shape for name, one in total.items()}:
            raise DataError(
                f"Episode {number} holds {shapes}, not what those before it hold.", mend="Leave it out, or mend it."
            )
        total = {name: one.merged(total[name]) if total else one for name, one in found.items()}
    if not total:
        raise DataError("There are no episodes.", mend="Give a data set of one episode or more.")
    return total
