"""What is encoded: the pictures or clips of a data set, read with their captions, decoded and cut."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from latentray.conditioning.images import Preprocessing
from latentray.data import clips, decode, latent_plan, members, shards
from latentray.data.kinds import CLIPS, MEMBERS, PICTURES
from latentray.data.latent_plan import Cut, Shape
from latentray.errors import DataError

_JPEG = b"\xff\xd8\xff"
_TEXTS = ("txt", "json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Which frames of a clip are encoded (`clips.window`)."""

    frames: int
    fps: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A sample of the data set, not yet decoded."""

    key: str
    shard: str
    """Where it is."""
    member: str
    """What its file is: `jpg`, `mp4` ..."""
    data: bytes
    digest: bytes
    """sha256 of the file."""
    captions: list[str]
    about: dict[str, Any]
    """Its `.json`."""
    label: int | None = None
    """Its class, by the index; None where it has none."""


def read(opened: shards.IndexedShards, row: int, kind: str) -> Source:
    """A sample of pictures or clips. Raises DigestMismatch for a damaged one, DataError for one of another kind."""
    raw = opened.read(row)
    held = {name.lower(): data for name, data in raw.items()}
    member = next((name for name in MEMBERS[kind] if name in held), None)
    if member is None:
        raise DataError(
            f"The sample {raw['__key__']!r} has no {kind[:-1]}.",
            where=raw["__url__"],
            mend=f"Give a data set of {kind}.",
        )
    texts = members.decode_sample(only_texts(raw))
    data = held[member]
    return Source(
        key=raw["__key__"],
        shard=raw["__url__"],
        member=member,
        data=data,
        digest=hashlib.sha256(data).digest(),
        captions=members.captions_of(texts),
        about=texts.get("json", {}),
        label=_label_of(opened, row),
    )


def _label_of(opened: shards.IndexedShards, row: int) -> int | None:
    found = int(opened.index.numbers("label")[row]) if "label" in opened.columns else -1
    return found if found >= 0 else None


def only_texts(sample: dict[str, Any]) -> dict[str, Any]:
    """A raw sample without its picture or frames."""
    return {name: value for name, value in sample.items() if name.startswith("__") or name in _TEXTS}


def views(source: Source, wanted: Mapping[str, Preprocessing], *, max_pixels: int) -> dict[str, np.ndarray]:
    """What each vision encoder sees of a picture: of all of it, whatever its variants are cut to."""
    return {name: view(source.data, one, max_pixels=max_pixels, where=source.key) for name, one in wanted.items()}


def view(data: bytes, shown: Preprocessing, *, max_pixels: int = decode.MAX_PIXELS, where: str = "") -> np.ndarray:
    """What a vision encoder sees of a picture's file, uint8 (h, w, 3). Raises SampleRejected as `decode.decode`."""
    least = max(shown.shorter, shown.height, shown.width)
    pixels, _ = decode.decode_at_least(data, least, least, max_pixels=max_pixels, where=where)
    return shown.view(pixels)


def cut_picture(
    source: Source, shapes: Sequence[Shape], variants: Sequence[int], *, max_pixels: int, window: Window | None = None
) -> dict[int, list[Cut]]:
    """The variants of a picture, each at every shape. Raises SampleRejected as `decode.decode`."""
    pixels, original = _decoded(source, shapes, max_pixels)
    return {
        variant: [latent_plan.cut(pixels[shape], original, shape, variant, source.digest) for shape in shapes]
        for variant in variants
    }


def _decoded(source: Source, shapes: Sequence[Shape], max_pixels: int) -> tuple[dict[Shape, np.ndarray], Shape]:
    """The picture for each shape, and its (height, width) in the file.

    What a shape gets does not depend on the others; a JPEG is decoded again only where a smaller scale covers the shape.
    """

    def at_least(shape: Shape) -> tuple[np.ndarray, Shape]:
        return decode.decode_at_least(source.data, *shape, max_pixels=max_pixels, where=source.key)

    def reduction(shape: Shape) -> int:
        return min(original[0] // shape[0], original[1] // shape[1])

    largest = max(shapes)
    pixels, original = at_least(largest)
    found = {largest: pixels}
    for shape in shapes:
        smaller = source.data.startswith(_JPEG) and reduction(shape) > reduction(largest) and reduction(shape) >= 2
        found.setdefault(shape, at_least(shape)[0] if smaller else pixels)
    return found, original


def cut_clip(
    source: Source, shapes: Sequence[Shape], variants: Sequence[int], *, max_pixels: int, window: Window | None = None
) -> dict[int, list[Cut]]:
    """The variants of a clip, each at every shape. Raises SampleRejected as `clips.source_of` and `clips.sample_frames`."""
    assert window is not None, "clips are encoded by windows"
    limits = clips.Limits(max_pixels=max_pixels)
    sample = {"__key__": source.key, "__url__": source.shard, source.member: source.data}
    frames = clips.source_of(members.decode_sample(sample) | {"json": source.about}, limits=limits)
    about: dict[str, Any] = {"frames": window.frames, "fps": window.fps, "where": source.key}
    taken: dict[float, np.ndarray] = {}
    found = {}
    for variant in variants:
        u = latent_plan.start(variant, source.digest)
        if u not in taken:  # a cut and its mirror are of the same frames
            taken[u] = clips.sample_frames(frames, u=u, limits=limits, **about)
        pixels_THWC = taken[u]
        first = clips.window(frames.times_T, u=u, **about)[0]
        begin = round(float(frames.times_T[first]), 6)
        original = (pixels_THWC.shape[1], pixels_THWC.shape[2])
        cuts = [latent_plan.cut(pixels_THWC, original, shape, variant, source.digest) for shape in shapes]
        found[variant] = [dataclasses.replace(one, begin=begin) for one in cuts]
    return found


CUT: dict[str, Callable[..., dict[int, list[Cut]]]] = {PICTURES: cut_picture, CLIPS: cut_clip}
"""Kind of a data set -> what makes the variants of its samples."""
