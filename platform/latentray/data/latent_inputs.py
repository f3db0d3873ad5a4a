"""What a latent job is made from: frames and shapes that fit data and autoencoder, and text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentray import build
from latentray.checkpoint import manifest, store
from latentray.conditioning import tiny_text_encoder
from latentray.conditioning.encoders import Encoder, ImageEncoder, load_configured
from latentray.conditioning.images import Preprocessing
from latentray.config.precompute_latents import PrecomputeLatents
from latentray.config.text_encoder import TextEncoderConfig
from latentray.data import clips, kinds, members
from latentray.data.latent_plan import Ints, Shapes
from latentray.data.latent_sources import Window, only_texts
from latentray.data.shards import IndexedShards
from latentray.errors import ConfigError, DataError

_CAPTIONS_FOR_TOKENIZER = 100_000


def window(config: PrecomputeLatents, sources: Sequence[IndexedShards]) -> Window | None:
    """Which frames are encoded; None of pictures.

    Raises DataError for a data set of another kind, ConfigError where settings and data do not fit.
    """
    wanted, found = config.clip, [kinds.kind_of(source) for source in sources]
    kind = found[0]
    if len(set(found)) > 1:
        raise DataError(
            f"One split holds {found[0]}, the other {found[1]}.",
            where=sources[1].uri,
            mend="Build both of the same.",
        )
    if kind == kinds.PICTURES:
        if wanted.frames is not None or wanted.fps is not None:
            raise ConfigError(
                "The data set holds pictures, not clips.",
                where="clip.frames" if wanted.frames is not None else "clip.fps",
                mend="Leave it out, or give a data set of clips.",
            )
        return None
    if kind != kinds.CLIPS:
        raise DataError(
            f"The data set holds {kind}: they have no pictures that an autoencoder could encode.",
            where=sources[0].uri,
            mend="Give a data set of pictures or clips.",
        )
    if wanted.frames is None:
        raise ConfigError(
            f"The data set holds clips{_told(sources, 'frames', ' of {} frames')}.",
            where="clip.frames",
            mend="Set clip.frames=16, say: each clip's first frames become one record.",
        )
    rates = _different(sources, "fps")
    if wanted.fps is None and len(rates) != 1:
        raise ConfigError(
            f"The clips have no one frame rate{_told(sources, 'fps', ': {} per second')}.",
            where="clip.fps",
            mend="Set clip.fps=8, say.",
        )
    found_window = Window(frames=wanted.frames, fps=rates[0] if wanted.fps is None else wanted.fps)
    _require_some_long_enough(found_window, sources)
    return found_window


def _require_some_long_enough(window: Window, sources: Sequence[IndexedShards]) -> None:
    """Raise ConfigError where by the indexes no clip is so long; some that are too short are rejected one by one."""
    for source in sources:
        if not {"frames", "fps"} <= set(source.columns):
            return
        lengths, rates = source.index.numbers("frames"), source.index.numbers("fps")
        if not clips.too_short(lengths, rates, frames=window.frames, fps=window.fps).all():
            return
    raise ConfigError(
        f"No clip is long enough for {window.frames} frames at {window.fps:g} per second: they are"
        f"{_told(sources, 'frames', ' of {} frames')}{_told(sources, 'fps', ' at {} per second')}.",
        where="clip.frames",
        mend="Lower clip.frames, or raise clip.fps, which repeats frames.",
    )


def _different(sources: Sequence[IndexedShards], column: str) -> list[float]:
    """The values of a column, each once, ascending; none where an index lacks it."""
    if not all(column in source.columns for source in sources):
        return []
    return np.unique(np.concatenate([source.index.numbers(column) for source in sources])).tolist()


def _told(sources: Sequence[IndexedShards], column: str, text: str) -> str:
    values = _different(sources, column)
    return text.format(f"{values[0]:g} to {values[-1]:g}" if len(values) > 1 else f"{values[0]:g}") if values else ""


def shapes(config: PrecomputeLatents, artifact: build.AutoencoderArtifact) -> tuple[tuple[int, ...], Shapes | None]:
    """The size of each store, and the shapes of the buckets. Raises ConfigError where the autoencoder cannot take them."""
    factor, wanted = artifact.config.downsampling, config.buckets
    if wanted.sizes:
        if wanted.step % factor:
            raise ConfigError(
                f"Steps of {wanted.step} pixels do not divide by the autoencoder's factor {factor}.",
                where="buckets.step",
                mend=f"Choose a multiple of {factor}.",
            )
        return (max(wanted.sizes),), Shapes.of(wanted.sizes, step=wanted.step, max_aspect=wanted.max_aspect)
    sizes = tuple(config.sizes or [artifact.size])
    for size in sizes:
        if size % factor:
            raise ConfigError(
                f"Pictures of {size} pixels do not divide by the autoencoder's factor {factor}.",
                where="sizes",
                mend=f"Choose multiples of {factor}.",
            )
    return sizes, None


def buckets_of(source: IndexedShards, given: Shapes | None) -> Ints:
    """(samples,): the bucket of each, by its size in the index. Raises DataError for an index without sizes."""
    if given is None:
        return np.zeros(source.count, np.int64)
    if not {"width", "height"} <= set(source.columns):
        raise DataError(
            "The index does not say how large the pictures are.",
            where=source.uri,
            mend="Build the data set again, or leave buckets out.",
        )
    return given.assign(source.index.numbers("width"), source.index.numbers("height"))


def text_encoder(wanted: TextEncoderConfig, train: IndexedShards, scratch: Path | None) -> tuple[Encoder, str]:
    """An encoder and where it is; a tiny one is made there first where the configuration says so."""
    source = wanted.source
    if wanted.build is not None:
        source = store.absolute(source)
        if manifest.find(source) is None:
            source = source if scratch is None else str(scratch / wanted.name)
            captions = (
                caption
                for x in range(min(train.count, _CAPTIONS_FOR_TOKENIZER))
                for caption in members.captions_of(members.decode_sample(only_texts(train.read(x))))
            )
            tiny_text_encoder.publish(source, captions, wanted.build)
            print(f"Made a tiny text encoder: {source}", flush=True)
    return load_configured(wanted, source=source), source


def views(encoders: Sequence[Encoder], window: Window | None) -> dict[str, Preprocessing]:
    """How each vision encoder is shown a picture. Raises ConfigError where there are clips."""
    found = {one.name: one.preprocessing for one in encoders if isinstance(one, ImageEncoder)}
    if found and window is not None:
        raise ConfigError(
            "A vision encoder reads pictures, and the data set holds clips.",
            where="text_encoders",
            mend=f"Leave {', '.join(found)} out.",
        )
    return found
