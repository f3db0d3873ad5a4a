"""Batches of clips for the video family: a window of frames of each, drawn anew in each epoch, cut and mirrored as one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from latentray.data import clips, decode
from latentray.data.damage import DAMAGED, damaged
from latentray.data.pipeline import OrderedSource, Part, Sample, common, parts_of, places, refused
from latentray.data.shards import IndexedShards
from latentray.data.transforms import Augment, Draws, draws_of
from latentray.errors import ConfigError, LatentrayError
from latentray.randomness import Purpose, keys_of, uniform
from latentray.records import ClipBatch, SampleId

_CROP_DRAWS = 2
"""Draws of the purpose CROP that are rows and columns; the next one is where a clip is cut in time."""


def clip_batches(
    source: OrderedSource[IndexedShards],
    *,
    frames: int,
    fps: float | None = None,
    shapes: Sequence[tuple[int, int]],
    augment: Augment,
    limits: clips.Limits | None = None,
    workers: int = 0,
) -> Iterator[ClipBatch]:
    """One ClipBatch per step of the source, with its rank's slice.

    Args:
        frames: T, of each window.
        fps: frames per second of each window; None keeps each clip's own rate.
        shapes: (height, width) of each of the order's buckets; one where there are none.
        augment: as for pictures; all frames of a clip are treated alike.
        limits: what one clip may cost.
        workers: loader processes; 0 reads in this one.

    Raises ConfigError where clips are too short, before any is read: by their indexes, and unless the source skips damaged
    samples. Then as `picture_batches`.
    """
    if not source.skip_damaged:
        for shards in source.sets:
            require_long_enough(shards, frames=frames, fps=fps)
    to_part = functools.partial(
        _part,
        frames=frames,
        fps=fps,
        shapes=tuple(shapes),
        augment=augment,
        limits=limits,
        seed=source.order.seed,
        skip_damaged=source.skip_damaged,
    )
    return _batches(source, to_part, workers)


def _batches(
    source: OrderedSource[IndexedShards], to_part: functools.partial[Part], workers: int
) -> Iterator[ClipBatch]:
    for parts in parts_of(source, to_part, workers):
        yield ClipBatch(
            x_BTCHW=decode.to_tensor(np.concatenate([part["pixels"] for part in parts])),
            captions=[text for part in parts for text in part["captions"]],
            **common(parts),
        )


def require_long_enough(shards: IndexedShards, *, frames: int, fps: float | None) -> None:
    """Raise ConfigError where a data set's index lists clips that have no such window, saying how many."""
    if not {"frames", "fps"} <= set(shards.columns):
        return
    short = clips.too_short(shards.index.numbers("frames"), shards.index.numbers("fps"), frames=frames, fps=fps)
    if short.any():
        raise ConfigError(
            f"{short.sum()} of {shards.count} clips are too short for {frames} frames at "
            f"{'their own rate' if fps is None else f'{fps:g} per second'}, {shards.key(int(short.argmax()))!r} is the first.",
            where=shards.uri,
            mend="Ask for fewer frames or a higher rate, or skip such clips (damage.policy=skip).",
        )


def _part(
    samples: list[Sample],
    *,
    frames: int,
    fps: float | None,
    shapes: Sequence[tuple[int, int]],
    augment: Augment,
    limits: clips.Limits | None,
    seed: int,
    skip_damaged: bool,
) -> Part:
    """`pixels` uint8 (n, T, h, w, 3), `captions`, and what every part has."""
    height, width = shapes[samples[0]["__bucket__"]]
    ids = [sample["__id__"] for sample in samples]
    pixels = np.zeros((len(samples), frames, height, width, 3), np.uint8)
    captions = [""] * len(samples)
    for row, (u, draws) in enumerate(zip(starts_of(seed, ids), draws_of(seed, ids), strict=True)):
        if DAMAGED in samples[row]:
            continue
        try:
            clip = clips.read_clip(samples[row], frames=frames, fps=fps, u=u, limits=limits)
            pixels[row] = _cut(clip.frames_THWC, height, width, augment, draws)
            captions[row] = augment.text(clip.captions, draws)
        except LatentrayError as error:
            if not skip_damaged:
                raise refused(error, samples[row]) from None
            samples[row] = damaged(error, samples[row])
    return places(samples) | {"pixels": pixels, "captions": captions}


def starts_of(seed: int, ids: Sequence[SampleId]) -> list[float]:
    """Where each clip's window begins, in [0, 1) of all possible starts: a crop in time, that of its sample and epoch."""
    return uniform(keys_of(seed, Purpose.CROP, ids), offset=_CROP_DRAWS).tolist()


def _cut(frames_THWC: np.ndarray, height: int, width: int, augment: Augment, draws: Draws) -> np.ndarray:
    size = (frames_THWC.shape[1], frames_THWC.shape[2])
    return np.stack([augment.picture(one, height, width, draws=draws, original_size=size)[0] for one in frames_THWC])
