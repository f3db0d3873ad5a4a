"""Batches of windows of episodes for the policy family: the samples of the order are windows, not episodes."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from latentray.checkpoint import store
from latentray.data import decode, episodes, members
from latentray.data.damage import damaged
from latentray.data.episodes import ACTIONS, OBS, Episode, EpisodeWindow, Horizon, WindowSet
from latentray.data.index import ShardEntry
from latentray.data.ordering import Whole
from latentray.data.pipeline import OrderedSource, Part, Sample, common, parts_of, places, refused
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, LatentrayError, SampleRejected
from latentray.records import EpisodeBatch

HELD_BYTES = 512 << 20
_WINDOW = "__window__"


class EpisodeWindows:
    """The windows of an indexed data set of episodes, by a flat position: what an OrderedSource reads.

    An episode is read and checked as a whole, and held for its other windows: of those read last, up to `held_bytes` in each
    process. Like IndexedShards it can be pickled, without what it holds, and serves one thread, `load` aside.
    """

    def __init__(self, shards: IndexedShards, horizon: Horizon, *, held_bytes: int = HELD_BYTES) -> None:
        """Raises DataError where the data set is none of episodes."""
        if "steps" not in shards.columns:
            raise DataError(
                "The data set's index has no column `steps`.", where=shards.uri, mend="Give a data set of episodes."
            )
        self.shards, self.horizon, self.held_bytes = shards, horizon, held_bytes
        self.windows = WindowSet(shards.index.numbers("steps"), horizon)
        self.uri, self.blocks = shards.uri, shards.blocks
        self._held: collections.OrderedDict[int, Episode] = collections.OrderedDict()
        self._bytes = 0

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.windows.count

    @property
    def digest(self) -> str:
        """Of the index and the horizon: another horizon has other windows."""
        return store.digest_of({"index": self.shards.digest, "horizon": dataclasses.asdict(self.horizon)})

    @property
    def samples(self) -> Whole:
        """As an order sees them."""
        return Whole(self.count, self.digest)

    @property
    def is_remote(self) -> bool:
        return self.shards.is_remote

    def read(self, x: int) -> Sample:
        """Window x as a sample whose `__window__` is its EpisodeWindow.

        Raises as IndexedShards.read, `members.decode_sample` and `episodes.read_episode`; DataError where the episode has
        another length than the index says.
        """
        number, start = self._place(x)
        episode = self._episode(number)
        found = episodes.window(episode, start, self.horizon)
        return {"__key__": self.key(x), "__url__": self.locate(x)[0].name, _WINDOW: found}

    def load(self, x: int) -> None:
        number, _ = self._place(x)
        if number not in self._held:
            self.shards.load(number)

    def key(self, x: int) -> str:
        """The key of window x's episode."""
        return self.shards.key(self._place(x)[0])

    def locate(self, x: int) -> tuple[ShardEntry, int, int]:
        """The shard of window x's episode, and the offset and length in bytes of its range there."""
        return self.shards.locate(self._place(x)[0])

    def _place(self, x: int) -> tuple[int, int]:
        number, start = self.windows.locate([x])
        return int(number[0]), int(start[0])

    def _episode(self, number: int) -> Episode:
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        episode = episodes.read_episode(members.decode_sample(self.shards.read(number)))
        steps = int(np.asarray(self.windows.steps_N)[number])
        if episode.steps != steps:
            raise DataError(
                f"The episode {self.shards.key(number)!r} has {episode.steps} steps; the index says {steps}.",
                where=self.uri,
                mend="Build the data set again.",
            )
        self._held[number] = episode
        self._bytes += _size(episode)
        while self._bytes > self.held_bytes and len(self._held) > 1:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return episode

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": collections.OrderedDict(), "_bytes": 0}


def episode_batches(
    source: OrderedSource[EpisodeWindows], *, ranges: Mapping[str, episodes.Range] | None = None, workers: int = 0
) -> Iterator[EpisodeBatch]:
    """One EpisodeBatch per step of the source, with its rank's slice.

    Args:
        ranges: `episodes.ranges` of the training data: actions and vectors become [-1, 1] by them.
        workers: loader processes; 0 reads in this one.

    Raises DataError where the ranges do not fit the episodes, and as `picture_batches` for an episode that cannot be used: one
    whose names, types or shapes differ from the first's is none either.
    """
    like = _first_window(source)
    to_part = functools.partial(_part, like=like, skip_damaged=source.skip_damaged)
    known = dict(ranges or {})
    _require_fitting(known, like)
    for parts in parts_of(source, to_part, workers):
        joined = {name: np.concatenate([part["arrays"][name] for part in parts]) for name in _arrays(like)}
        yield EpisodeBatch(
            actions_BTA=_tensor(joined[ACTIONS], known.get(ACTIONS)),
            action_mask_BT=torch.from_numpy(joined["action_mask"]),
            observations={name: _tensor(joined[f"{OBS}{name}"], known.get(f"{OBS}{name}")) for name in like.obs},
            observation_mask_BT=torch.from_numpy(joined["observation_mask"]),
            **common(parts),
        )


def _first_window(source: OrderedSource[EpisodeWindows]) -> EpisodeWindow:
    """The first window that can be read: all others are like it, and it stands at the places of the damaged."""
    for windows in source.sets:
        x = 0
        while x < windows.count:
            try:
                return windows.read(x)[_WINDOW]
            except LatentrayError as error:
                if not source.skip_damaged:
                    raise refused(error, {"__key__": windows.key(x), "__url__": windows.uri}) from None
                damaged(
                    error, dict.fromkeys(("__id__", "__step__", "__bucket__", "__traffic__"))
                )  # raises what is none
            number = int(windows.windows.locate([x])[0][0])
            x += int(windows.horizon.counts(np.asarray(windows.windows.steps_N)[number]))
    raise DataError("No episode of the data set can be read.", where=source.sets[0].uri, mend="Restore its shards.")


def _part(samples: list[Sample], *, like: EpisodeWindow, skip_damaged: bool) -> Part:
    """`arrays`: name -> (n, T, ...), and what every part has."""
    expected = _layout(like)
    found: list[EpisodeWindow] = []
    for row, sample in enumerate(samples):
        window = sample.get(_WINDOW, like)
        if _layout(window) != expected:
            error = SampleRejected(
                "layout",
                f"The episode {sample['__key__']!r} holds {_layout(window)}; the first one, {expected}.",
                where=str(sample["__url__"]),
            )
            if not skip_damaged:
                raise refused(error, sample)
            samples[row], window = damaged(error, sample), like
        found.append(window)
    arrays = [_arrays(window) for window in found]
    return places(samples) | {"arrays": {name: np.stack([one[name] for one in arrays]) for name in arrays[0]}}


def _arrays(window: EpisodeWindow) -> dict[str, np.ndarray]:
    masks = {"action_mask": window.action_mask, "observation_mask": window.observation_mask}
    return masks | {ACTIONS: window.actions} | {f"{OBS}{name}": values for name, values in window.obs.items()}


def _layout(window: EpisodeWindow) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> type and shape of a step."""
    return {
        name: (str(values.dtype), values.shape[1:])
        for name, values in sorted(_arrays(window).items())
        if name == ACTIONS or name.startswith(OBS)
    }


def _require_fitting(ranges: Mapping[str, episodes.Range], like: EpisodeWindow) -> None:
    have = {name: values.shape[1:] for name, values in _arrays(like).items()}
    for name, known in ranges.items():
        if have.get(name) != known.low.shape:
            raise DataError(
                f"The range of {name} is of {known.low.shape}; the episodes hold {have.get(name, 'none')}.",
                mend="Take the ranges of the data set that is trained on.",
            )


def _tensor(values: np.ndarray, known: episodes.Range | None) -> torch.Tensor:
    if known is not None:
        return torch.from_numpy(known.normalised(values))
    if values.dtype == np.uint8 and values.ndim == 5 and values.shape[-1] == 3:
        return decode.to_tensor(values)
    return torch.from_numpy(values).to(torch.float32)


def _size(episode: Episode) -> int:
    return episode.actions_TA.nbytes + sum(values.nbytes for values in episode.obs.values())
