"""Batches of latents and embedded captions for stage 2."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.torch
import torch

from latentray.data.latent_reader import LatentReader, Rows
from latentray.data.pipeline import OrderedSource, Part, Sample, common, parts_of, places, usable
from latentray.data.read_ahead import ahead
from latentray.data.sample_facts import SampleFacts
from latentray.data.shards import IndexedShards
from latentray.errors import DataError
from latentray.randomness import Purpose, keys_of, uniform
from latentray.records import LATENT_MEMBER, Conditions, LatentBatch, SampleId, TextEmbedding, Traffic


def latent_batches(source: OrderedSource, *, encoders: Sequence[str] = (), workers: int = 0) -> Iterator[LatentBatch]:
    """One LatentBatch per step of the source, with its rank's slice; text in the type it is stored in.

    Of a sample's captions one is drawn, for all encoders alike. Local shards are read by a LatentReader, a batch at a time;
    remote ones stream through the WebDataset pipeline. Without loader processes a thread of this one reads a batch ahead.

    Args:
        encoders: names of the text encoders whose embeddings are wanted.
        workers: loader processes for remote shards; 0 reads in this one.

    Raises as `picture_batches`.
    """
    sets, order = source.sets, source.order
    batch_of = functools.partial(_batch, Template(sets), SampleFacts(sets), encoders=encoders, seed=order.seed)
    if source.is_local:
        yield from ahead(_read(source, batch_of))
        return
    parts_of_steps = parts_of(source, _part, workers)
    for parts in parts_of_steps if workers else ahead(parts_of_steps):
        first, rows = 0, []
        for part in parts:
            rows += [
                Rows(places=[first + place for place in one["places"]], tensors=safetensors.torch.load(one["tensors"]))
                for one in part["rows"]
            ]
            first += len(part["ids"])
        yield batch_of(rows, common(parts))


def _read(
    source: OrderedSource, batch_of: Callable[[list[Rows], dict[str, Any]], LatentBatch]
) -> Iterator[LatentBatch]:
    reader = LatentReader(source.sets, skip_damaged=source.skip_damaged)
    for _, step in source.parts(0, 1):
        rows, found = reader.read(step.ids)
        yield batch_of(rows, common([{"ids": step.ids, "damaged": found, "traffic": Traffic()}]))


def _batch(
    template: Template,
    told: SampleFacts,
    rows: list[Rows],
    common: dict[str, Any],
    *,
    encoders: Sequence[str],
    seed: int,
) -> LatentBatch:
    """Records of any layouts as one batch; a sample that is whole stands at the places of the damaged."""
    ids = common["ids"]
    drawn = [Rows(places=one.places, tensors=_drawn(one, ids, encoders, seed)) for one in rows]
    if len(drawn) == 1 and drawn[0].places == list(range(len(ids))):
        tensors = drawn[0].tensors
    else:
        whole = drawn[0] if drawn else Rows(places=[0], tensors=_drawn(template.like(ids[0]), ids[:1], encoders, seed))
        tensors = {name: t[:1].repeat(len(ids), *[1] * (t.ndim - 1)) for name, t in whole.tensors.items()}
        for one in drawn:
            for name, values in one.tensors.items():
                tensors[name][one.places] = values.to(tensors[name].dtype)
    return LatentBatch(
        mean_BChw=tensors["mean"].float(),
        logvar_BChw=tensors["logvar"].float(),
        given=Conditions(
            texts=tuple(_text(tensors, name) for name in encoders),
            size_B6=told.sizes(ids),
            labels_B=told.labels(ids),
        ),
        **common,
    )


def _text(tensors: Mapping[str, torch.Tensor], encoder: str) -> TextEmbedding:
    tokens, mask, pooled = (tensors[name] for name in _members(tensors, encoder))
    return TextEmbedding(tokens_BLD=tokens, mask_BL=mask.bool(), pooled_BD=pooled)


def _members(tensors: Mapping[str, torch.Tensor], encoder: str) -> tuple[str, str, str]:
    kind = "image" if f"image.{encoder}.tokens" in tensors else "text"
    return f"{kind}.{encoder}.tokens", f"{kind}.{encoder}.mask", f"{kind}.{encoder}.pooled"


def _drawn(rows: Rows, ids: list[SampleId], encoders: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """mean, logvar (n, C, h, w) and, by each encoder of one caption each, tokens (n, L, D), mask (n, L), pooled (n, D)."""
    wanted = [name for encoder in encoders for name in _members(rows.tensors, encoder)]
    seen = [name for name in wanted if name.startswith("image.")]
    try:
        latent = {name: rows.tensors[name] for name in ("mean", "logvar", *seen)}
        texts = {name: rows.tensors[name] for name in wanted if name not in seen}
    except KeyError as error:
        raise DataError(f"The latent record has no {error}.", mend="Precompute the latents again.") from None
    if not texts:
        return latent
    captions = next(iter(texts.values())).shape[1]
    if captions == 1:
        return latent | {name: values[:, 0] for name, values in texts.items()}
    chosen = _choices(seed, [ids[place] for place in rows.places], [captions] * len(rows.places))
    return latent | {name: values[torch.arange(len(chosen)), chosen] for name, values in texts.items()}


class Template:
    """Samples that can be read, of a shape that is asked for. Only looked for where a whole slice is damaged."""

    def __init__(self, sets: Sequence[IndexedShards]) -> None:
        self.sets = sets

    def like(self, one: SampleId) -> Rows:
        """A whole sample of one's own height and width. Raises DataError where there is none."""
        reader = LatentReader(self.sets, skip_damaged=True)
        for number, shards in enumerate(self.sets):
            for x in np.flatnonzero(self._alike(shards, one)).tolist():
                rows, _ = reader.read([SampleId(epoch=0, dataset=number, index=x)])
                if rows:
                    return rows[0]
        raise DataError("No sample of the data set can be read.", where=self.sets[0].uri, mend="Restore its shards.")

    def _alike(self, shards: IndexedShards, one: SampleId) -> np.ndarray:
        """(samples,): which are as high and wide as one; all of them where an index does not say it."""
        alike = np.ones(shards.count, bool)
        of = self.sets[one.dataset]
        for name in ("height", "width"):
            if name in shards.columns and name in of.columns:
                alike &= shards.index.numbers(name) == of.index.numbers(name)[one.index]
        return alike


def _part(samples: list[Sample]) -> Part:
    """`ids`, `damaged`, and `rows`: by layout, `places` and `tensors` (safetensors, (n, ...) each)."""
    by_layout: dict[Any, tuple[list[int], list[dict[str, torch.Tensor]]]] = {}
    for row, sample in usable(samples):
        record = _record(sample)
        layout = tuple((name, t.dtype, t.shape) for name, t in record.items())
        at, records = by_layout.setdefault(layout, ([], []))
        at.append(row)
        records.append(record)
    rows = [
        {"places": at, "tensors": safetensors.torch.save({n: torch.stack([r[n] for r in records]) for n in records[0]})}
        for at, records in by_layout.values()
    ]
    return places(samples) | {"rows": rows}


def _record(sample: Sample) -> dict[str, torch.Tensor]:
    if LATENT_MEMBER not in sample:
        raise DataError(
            f"The sample {sample['__key__']!r} has no latent.",
            where=sample["__url__"],
            mend="Give precomputed latents.",
        )
    return sample[LATENT_MEMBER]


def _choices(seed: int, ids: list[SampleId], counts: Iterable[int]) -> list[int]:
    """Which of its captions each sample takes: a draw that belongs to the sample and its epoch."""
    draws = uniform(keys_of(seed, Purpose.CAPTION, ids)).tolist()
    return [min(math.floor(u * n), n - 1) for u, n in zip(draws, counts, strict=True)]
