"""What a sample of each kind shows who looks at a data set: captions, a picture, and facts to be counted."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from latentray.data import clips, episodes, members
from latentray.data.kinds import CLIPS, EPISODES, LATENTS, PICTURES
from latentray.errors import DataError
from latentray.records import LATENT_MEMBER

_FRAMES_AT_ONCE = 64
_CHANNEL_AXIS = -3
"""Of latents, (C, h, w) or (T, C, h, w)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What one sample shows."""

    captions: list[str]
    picture: np.ndarray | None = None
    """uint8 (H, W, 3), for the contact sheet."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def picture(decoded: Mapping[str, Any]) -> Seen:
    return Seen(captions=members.captions_of(decoded), picture=members.picture_of(decoded))


def clip(decoded: Mapping[str, Any]) -> Seen:
    """All frames are decoded, some at a time; the middle one is shown."""
    source = clips.source_of(decoded)
    count = len(source.times_T)
    middle = np.empty(0)
    for first in range(0, count, _FRAMES_AT_ONCE):
        frames = source.take(range(first, min(first + _FRAMES_AT_ONCE, count)))
        if first <= count // 2 < first + len(frames):
            middle = frames[count // 2 - first]
    facts = {"frames": count, "fps": source.fps}
    return Seen(captions=members.captions_of(decoded), picture=middle, facts=facts)


def episode(decoded: Mapping[str, Any]) -> Seen:
    """What is named, its shape without steps, and its range; of observed pictures the middle one is shown."""
    one = episodes.read_episode(decoded)
    held = {"actions": one.actions_TA} | {f"obs.{name}": values for name, values in one.obs.items()}
    shown = [values for values in one.obs.values() if values.dtype == np.uint8 and values.shape[2:][1:] == (3,)]
    facts = {
        "steps": one.steps,
        "shapes": {name: [values.dtype.name, *values.shape[1:]] for name, values in held.items()},
        "ranges": {name: episodes.Range.of(values) for name, values in held.items() if values.ndim == 2},
    }
    texts = members.captions_of(decoded)
    return Seen(captions=texts if any(texts) else [], picture=shown[0][one.steps // 2] if shown else None, facts=facts)


def latent(decoded: Mapping[str, Any]) -> Seen:
    """The latent's shape, and sums over it by channel, from which mean and standard deviation of many follow."""
    held = decoded.get(LATENT_MEMBER, {})
    if "mean" not in held or "logvar" not in held or held["mean"].shape != held["logvar"].shape:
        raise DataError(f"The sample {decoded.get('__key__')!r} has no latent.", mend="Precompute the latents again.")
    mean, logvar = (np.moveaxis(held[name].double().numpy(), _CHANNEL_AXIS, 0) for name in ("mean", "logvar"))
    if not (np.isfinite(mean).all() and np.isfinite(logvar).all()):
        raise DataError(
            f"The latent of {decoded.get('__key__')!r} is not finite.", mend="Precompute the latents again."
        )
    flat, posterior = mean.reshape(len(mean), -1), np.exp(logvar).reshape(len(mean), -1)
    facts = {
        "shape": tuple(held["mean"].shape),
        "count": flat.shape[1],
        "sum": flat.sum(axis=1),
        "squares": (flat**2).sum(axis=1),
        "variance": posterior.sum(axis=1),
    }
    return Seen(captions=members.captions_of(decoded), facts=facts)


LOOK: dict[str, Callable[[Mapping[str, Any]], Seen]] = {
    PICTURES: picture,
    CLIPS: clip,
    EPISODES: episode,
    LATENTS: latent,
}
"""Kind -> what to see of a decoded sample. Raises the errors of what reads it."""


def of_clips(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Frames, rates and seconds."""
    return {
        "frames": value_range([one["frames"] for one in facts]),
        "fps": value_range([one["fps"] for one in facts]),
        "seconds": value_range([one["frames"] / one["fps"] for one in facts]),
    }


def of_episodes(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Steps, and of actions and observations by name: how many episodes have which shape, and the range of vectors."""
    shapes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    ranges: dict[str, episodes.Range] = {}
    for one in facts:
        for name, (dtype, *shape) in one["shapes"].items():
            shapes[name][f"{dtype} ({', '.join(['T', *map(str, shape)])})"] += 1
        for name, found in one["ranges"].items():
            before = ranges.get(name)
            if before is None or before.low.shape == found.low.shape:
                ranges[name] = found if before is None else before.merged(found)
    held = {
        name: {"shapes": dict(counts), **(ranges[name].to_json() if name in ranges else {})}
        for name, counts in sorted(shapes.items())
    }
    return {"steps": value_range([one["steps"] for one in facts]), "held": held}


def of_latents(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shapes and their counts; by channel the mean of the latents, their standard deviation and the posteriors' own."""
    shapes = collections.Counter(" x ".join(map(str, one["shape"])) for one in facts)
    numbers = sum(one["count"] for one in facts)
    mean, squares, variance = (sum(one[name] for one in facts) / numbers for name in ("sum", "squares", "variance"))
    return {
        "latent_shapes": dict(sorted(shapes.items())),
        "latent_mean": np.asarray(mean).tolist(),
        "latent_std": np.sqrt(np.maximum(squares - mean**2, 0)).tolist(),
        "posterior_std": np.sqrt(variance).tolist(),
    }


FIGURES: dict[str, Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]] = {
    PICTURES: lambda facts: {},
    CLIPS: of_clips,
    EPISODES: of_episodes,
    LATENTS: of_latents,
}
"""Kind -> figures of the facts of one sample or more."""


def value_range(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Least, median and greatest."""
    array = np.asarray(values, dtype=np.float64)
    return {"min": float(array.min()), "median": float(np.median(array)), "max": float(array.max())}
