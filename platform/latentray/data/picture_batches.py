"""Batches of pictures for stage 1, and their captions: decoded at the scale that is wanted, cut, mirrored."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from latentray.conditioning.images import Preprocessing
from latentray.data import decode, members
from latentray.data.damage import DAMAGED, damaged
from latentray.data.pipeline import Part, Sample, Source, common, parts_of, places
from latentray.data.read_ahead import ahead
from latentray.data.transforms import Augment, Draws, draws_of
from latentray.errors import LatentrayError
from latentray.records import PICTURE_SUFFIXES, PictureBatch


def picture_batches(
    source: Source,
    *,
    shapes: Sequence[tuple[int, int]],
    augment: Augment,
    workers: int = 0,
    shown: Mapping[str, Preprocessing] | None = None,
) -> Iterator[PictureBatch]:
    """One PictureBatch per step of the source, with its rank's slice.

    Args:
        shapes: (height, width) of each of the order's buckets; one where there are none.
        augment: where pictures are cut, whether half of them are mirrored, and how captions vary.
        shown: by vision encoder, how it is shown a picture: the whole of it, neither cut nor mirrored.
        workers: loader processes; 0 reads in this one, in a thread that is a batch ahead.

    Raises DigestMismatch for a sample that differs from the index and DataError for one that cannot be decoded, unless the
    source skips them; UnsafeMember always.
    """
    to_part = functools.partial(
        _part,
        shapes=tuple(shapes),
        augment=augment,
        seed=source.order.seed,
        skip_damaged=source.skip_damaged,
        shown=dict(shown or {}),
    )
    parts_of_steps = parts_of(source, to_part, workers, as_bytes=PICTURE_SUFFIXES)
    for parts in parts_of_steps if workers else ahead(parts_of_steps):
        yield PictureBatch(
            x_BCHW=decode.to_tensor(np.concatenate([part["pixels"] for part in parts])),
            size_B6=torch.from_numpy(np.concatenate([part["sizes"] for part in parts])),
            captions=[text for part in parts for text in part["captions"]],
            views={
                name: torch.from_numpy(np.concatenate([part["views"][name] for part in parts])) for name in shown or {}
            },
            **common(parts),
        )


def _part(
    samples: list[Sample],
    *,
    shapes: Sequence[tuple[int, int]],
    augment: Augment,
    seed: int,
    skip_damaged: bool,
    shown: Mapping[str, Preprocessing],
) -> Part:
    """`pixels` uint8 (n, h, w, 3), `sizes` float32 (n, 6), `captions`, `views` uint8 by encoder, and what every part has."""
    height, width = shapes[samples[0]["__bucket__"]]
    pixels = np.zeros((len(samples), height, width, 3), np.uint8)
    sizes = np.zeros((len(samples), 6), np.float32)
    captions = [""] * len(samples)
    views = {name: np.zeros((len(samples), one.height, one.width, 3), np.uint8) for name, one in shown.items()}
    for row, draws in enumerate(draws_of(seed, [sample["__id__"] for sample in samples])):
        if DAMAGED in samples[row]:
            continue
        try:
            pixels[row], sizes[row], captions[row] = _augmented(samples[row], height, width, augment, draws)
            for name, one in shown.items():
                views[name][row] = members.view_of(samples[row], one)
        except LatentrayError as error:
            if not skip_damaged:
                raise
            samples[row] = damaged(error, samples[row])
    return places(samples) | {"pixels": pixels, "sizes": sizes, "captions": captions, "views": views}


def _augmented(
    sample: Sample, height: int, width: int, augment: Augment, draws: Draws
) -> tuple[np.ndarray, tuple[int, ...], str]:
    whole, original_size = members.picture_at_least(sample, height, width)
    cut, told = augment.picture(whole, height, width, draws=draws, original_size=original_size)
    return cut, told.numbers(), augment.text(members.captions_of(sample), draws)
