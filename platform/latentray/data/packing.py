"""One output shard: its samples read or drawn, decoded once to be sure that they can be, and written to a tar."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from latentray.checkpoint import store
from latentray.config.build_shards import BuildShards, SourceConfig
from latentray.data import decode, index, shards, sources, synthetic, synthetic_clips, synthetic_episodes, tar_samples
from latentray.data.captions import Captions
from latentray.data.shard_plans import Piece, ShardPlan
from latentray.data.survey import Reject
from latentray.errors import SampleRejected
from latentray.randomness import Purpose, mix

Load = Callable[[], tuple[bytes, list[str], dict[str, Any]]]
"""Gives a sample's picture, captions and metadata, with its `label` where it has one, or raises SampleRejected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """What became of a plan: the shard (None where every sample was rejected), and the rejects with their reasons."""

    split: str
    result: index.ShardResult | None
    rejected: list[Reject]


def pack(plan: ShardPlan, config: BuildShards, captions: Captions | None = None) -> Packed:
    """Pack one shard and upload it. A sample that cannot be used is left out and listed; the rest goes on."""
    rejected: list[Reject] = []
    made = DRAWERS[config.source.name](plan, config) if plan.drawn else _read_samples(plan, config, captions, rejected)
    with store.staging() as folder:
        result = shards.write_shard(made, folder / plan.name)
        if not result.entry.count:
            return Packed(split=plan.split, result=None, rejected=rejected)
        store.upload(folder / plan.name, store.join(plan.uri, plan.name))
    return Packed(split=plan.split, result=result, rejected=rejected)


def _shapes(plan: ShardPlan, config: BuildShards) -> Iterator[shards.Sample]:
    for number in range(plan.first, plan.first + plan.drawn):
        kind = synthetic.kind_of(plan.split, number)
        pixels = synthetic.draw(kind, config.seed, number, split=plan.split)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        about = dataclasses.asdict(kind) | {"source": f"shapes/{plan.split}/{number}"}
        yield _sample(
            number, buffer.getvalue(), "png", [synthetic.caption(kind)], pixels.shape[1], pixels.shape[0], about
        )


def _moving_shapes(plan: ShardPlan, config: BuildShards) -> Iterator[shards.Sample]:
    source = config.source
    yield from synthetic_clips.samples(
        plan.split,
        seed=config.seed,
        first=plan.first,
        count=plan.drawn,
        frames=source.frames,
        fps=source.fps,
        form=source.form,
    )


def _gate(plan: ShardPlan, config: BuildShards) -> Iterator[shards.Sample]:
    seed = mix(config.seed, Purpose.SPLIT, synthetic.SPLITS[plan.split].number)
    yield from synthetic_episodes.episodes(plan.drawn, seed, first=plan.first)


DRAWERS: dict[str, Callable[[ShardPlan, BuildShards], Iterator[shards.Sample]]] = {
    "shapes": _shapes,
    "moving_shapes": _moving_shapes,
    "gate": _gate,
}
"""Drawn source -> the samples of a shard."""


def _read_samples(
    plan: ShardPlan, config: BuildShards, captions: Captions | None, rejected: list[Reject]
) -> Iterator[shards.Sample]:
    first = plan.first
    for piece in plan.pieces:
        read = _tar_reads(piece, config, captions) if piece.places else _entry_reads(piece, config)
        for number, (name, load) in enumerate(read, start=first):
            try:
                data, texts, about = load()
                pixels, suffix = decode.decode_with_format(data, max_pixels=config.max_pixels, where=name)
            except SampleRejected as error:
                rejected.append({"name": name, "reason": error.reason, "what": error.what})
                continue
            height, width = pixels.shape[:2]
            yield _sample(number, data, suffix, texts, width, height, about | {"source": name})
        first += len(piece.rows)


def _entry_reads(piece: Piece, config: BuildShards) -> Iterator[tuple[str, Load]]:
    for entry in sources.entries(piece.part, config.source, piece.rows):
        yield entry["name"], functools.partial(_load_entry, entry)


def _load_entry(entry: sources.Entry) -> tuple[bytes, list[str], dict[str, Any]]:
    data, captions = sources.read(entry)
    return data, captions, {} if entry["label"] is None else {"label": entry["label"]}


def _tar_reads(piece: Piece, config: BuildShards, captions: Captions | None) -> Iterator[tuple[str, Load]]:
    for sample in tar_samples.read(piece.part.uri, piece.part.name, piece.places):
        name = sample.where if isinstance(sample, SampleRejected) else sample.name
        yield name, functools.partial(_load_tar_sample, sample, captions, config.source)


def _load_tar_sample(
    sample: tar_samples.TarSample | SampleRejected, captions: Captions | None, config: SourceConfig
) -> tuple[bytes, list[str], dict[str, Any]]:
    if isinstance(sample, SampleRejected):
        raise sample
    data, metadata = sample.picture(), sample.metadata()
    label = sample.label(metadata, config.label or "label")
    try:
        texts = sample.captions_by(captions, config.join, metadata, hashlib.sha256(data).hexdigest())
    except SampleRejected:
        if label is None or captions is not None:
            raise
        texts = [""]  # a class says what it shows
    return data, texts, metadata if label is None else metadata | {"label": label}


def _sample(
    number: int, data: bytes, suffix: str, captions: list[str], width: int, height: int, about: dict[str, Any]
) -> shards.Sample:
    digest = hashlib.sha256(data).hexdigest()
    record = about | {"captions": captions, "width": width, "height": height, "sha256": digest}
    return shards.Sample(
        key=f"{number:09d}",
        members={suffix: data, "txt": captions[0].encode(), "json": _json(record)},
        columns={
            "sha256": bytes.fromhex(digest),
            "width": width,
            "height": height,
            "label": sources.label_of(about.get("label")),
        },
    )


def _json(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, or a file name that is no UTF-8
        return json.dumps(record, sort_keys=True).encode()
