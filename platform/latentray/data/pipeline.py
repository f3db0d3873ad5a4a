"""From an indexed data set to the batches of a rank: a `webdataset.DataPipeline` whose first stage follows the order.

Stages: ordered source (raw WebDataset samples) -> decode by the members table -> arrays -> the part of a step. Loader
workers split by slot: each makes its part of every step, and the parts are joined in order, so any number of workers
gives the same numbers, and reading ahead needs no saved loader state.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import safetensors.torch
import torch
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from latentray.checkpoint import store
from latentray.data import decode, members
from latentray.data.ordering import Order, require_divides
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, LatentrayError
from latentray.randomness import Purpose, keys_of, uniform
from latentray.records import LATENT_MEMBER, LatentBatch, PictureBatch, SampleId, TextEmbedding

Sample = dict[str, Any]
Part = dict[str, Any]
"""A worker's part of one step. Its tensors travel as NumPy arrays or as safetensors bytes, through a pipe: torch's own
way takes shared memory, of which a container has 64 MB."""


class OrderedSource:
    """First stage: the raw WebDataset samples of this rank's (and this loader worker's) slots, step after step.

    Each carries `__id__` (SampleId) and `__step__`. It ends before `last_step`, or never where that is None.
    """

    def __init__(
        self, shards: IndexedShards, order: Order, *, rank: int, world: int, first_step: int, last_step: int | None
    ):
        if order.n != shards.count:
            raise DataError(
                f"The order is of {order.n} samples; the data set has {shards.count}.",
                where=shards.uri,
                mend="Use one data set.",
            )
        require_divides(order.global_batch, world)
        self.shards, self.order, self.rank, self.world = shards, order, rank, world
        self.steps = (first_step, last_step)

    def __call__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = self.rank * workers + worker, self.world * workers
        batch = self.order.global_batch
        first, last = batch * part // parts, batch * (part + 1) // parts
        begin, end = self.steps
        for step in itertools.count(begin) if end is None else range(begin, end):
            for sample_id in self.order.slots(step, first, last):
                yield self.shards.read(sample_id.index) | {"__id__": sample_id, "__step__": step}


def raw_pipeline(source: OrderedSource, *stages: Callable[[Iterable], Iterator]) -> webdataset.DataPipeline:
    """A WebDataset pipeline of ordered, safely decoded samples, to which any WebDataset stage may be added."""
    return webdataset.DataPipeline(source, webdataset.map(members.decode_sample), *stages)


def picture_batches(
    shards: IndexedShards,
    order: Order,
    *,
    rank: int,
    world: int,
    first_step: int,
    last_step: int | None,
    size: int,
    flip: bool,
    workers: int = 0,
    with_captions: bool = False,
) -> Iterator[Any]:
    """One PictureBatch per global step in [first_step, last_step), with this rank's slice: x (B, 3, size, size).

    Pictures are resized and cut to the centre square; with `flip`, half of them are mirrored. `with_captions` gives
    `(PictureBatch, list[str])`, one caption drawn per picture. `last_step=None` never ends.

    Raises DigestMismatch for a sample that differs from the index, UnsafeMember and DataError for one that cannot be
    decoded, ConfigError where `world` does not divide the global batch.
    """
    source = OrderedSource(shards, order, rank=rank, world=world, first_step=first_step, last_step=last_step)
    to_part = functools.partial(_picture_part, size=size, flip=flip, captions=with_captions, seed=order.seed)
    for parts in _parts(source, to_part, workers):
        ids = [i for part in parts for i in part["ids"]]
        x_BCHW = decode.to_tensor(np.concatenate([part["pixels"] for part in parts]))
        batch = PictureBatch(x_BCHW=x_BCHW, ids=ids)
        yield (batch, [text for part in parts for text in part["captions"]]) if with_captions else batch


def latent_batches(
    shards: IndexedShards,
    order: Order,
    *,
    rank: int,
    world: int,
    first_step: int,
    last_step: int | None,
    workers: int = 0,
    encoder: str | None = None,
) -> Iterator[LatentBatch]:
    """One LatentBatch per global step in [first_step, last_step), with this rank's slice; all float32.

    Of a sample's captions one is drawn. `encoder` names the text encoder, where the latents hold more than one.
    Raises as `picture_batches`.
    """
    source = OrderedSource(shards, order, rank=rank, world=world, first_step=first_step, last_step=last_step)
    to_part = functools.partial(_latent_part, encoder=encoder, seed=order.seed)
    for parts in _parts(source, to_part, workers):
        loaded = [safetensors.torch.load(part["tensors"]) for part in parts]
        joined = {name: torch.cat([tensors[name] for tensors in loaded]) for name in loaded[0]}
        yield LatentBatch(
            mean_BChw=joined["mean"].float(),
            logvar_BChw=joined["logvar"].float(),
            text=TextEmbedding(
                tokens_BLD=joined["tokens"].float(), mask_BL=joined["mask"].bool(), pooled_BD=joined["pooled"].float()
            ),
            ids=[i for part in parts for i in part["ids"]],
        )


def _parts(source: OrderedSource, to_part: Callable[[list[Sample]], Part], workers: int) -> Iterator[list[Part]]:
    """The parts of each step, in slot order: one where this process reads, else one per loader worker."""
    pipeline = raw_pipeline(source, functools.partial(_by_step, to_part=to_part))
    workers = min(workers, source.order.global_batch // source.world)  # every worker has a slot in each step
    if workers == 0:
        yield from ([_raised(part)] for part in pipeline)
        return
    # A forked child cannot use S3 clients that its parent opened; a fresh process can, and starts slower.
    start = "spawn" if store.is_remote(source.shards.uri) else "fork"
    loader = iter(DataLoader(pipeline, batch_size=None, num_workers=workers, multiprocessing_context=start))
    while parts := [_raised(part) for part in itertools.islice(loader, workers)]:
        yield parts


def _raised(part: Part | LatentrayError) -> Part:
    if isinstance(part, LatentrayError):
        raise part
    return part


def _by_step(samples: Iterable[Sample], *, to_part: Callable[[list[Sample]], Part]) -> Iterator[Part | LatentrayError]:
    """Last stage: the samples of one step as one part. An error of ours passes as a value, so that it arrives whole."""
    try:
        for _, group in itertools.groupby(samples, key=lambda sample: sample["__step__"]):
            yield to_part(list(group))
    except LatentrayError as error:
        yield error


def _picture_part(samples: list[Sample], *, size: int, flip: bool, captions: bool, seed: int) -> Part:
    """`pixels` uint8 (B, size, size, 3), `ids`, and `captions` where asked for."""
    ids = [sample["__id__"] for sample in samples]
    pixels = np.stack([decode.to_square(members.picture_of(sample), size) for sample in samples])
    if flip:
        mirrored = (uniform(keys_of(seed, Purpose.FLIP, ids)) < 0.5).numpy()
        pixels[mirrored] = pixels[mirrored, :, ::-1]
    part: Part = {"ids": ids, "pixels": pixels}
    if captions:
        texts = [members.captions_of(sample) for sample in samples]
        part["captions"] = [t[j] for t, j in zip(texts, _choices(seed, ids, map(len, texts)), strict=True)]
    return part


def _latent_part(samples: list[Sample], *, encoder: str | None, seed: int) -> Part:
    """`ids`, and `tensors`: safetensors of mean, logvar (B, C, h, w), tokens (B, L, D), mask (B, L), pooled (B, D)."""
    ids = [sample["__id__"] for sample in samples]
    records = [_latent_record(sample) for sample in samples]
    prefix = f"text.{encoder or _only_encoder(samples[0], records[0])}"
    rows: dict[str, list[torch.Tensor]] = {"mean": [], "logvar": [], "tokens": [], "mask": [], "pooled": []}
    try:
        choices = _choices(seed, ids, [len(record[f"{prefix}.tokens"]) for record in records])
        for record, j in zip(records, choices, strict=True):
            for name in ("mean", "logvar"):
                rows[name].append(record[name])
            for name in ("tokens", "mask", "pooled"):
                rows[name].append(record[f"{prefix}.{name}"][j])
    except KeyError as error:
        raise DataError(
            f"The latent record has no {error}.", where=samples[0]["__url__"], mend="Precompute the latents again."
        ) from None
    return {"ids": ids, "tensors": safetensors.torch.save({name: torch.stack(part) for name, part in rows.items()})}


def _latent_record(sample: Sample) -> dict[str, torch.Tensor]:
    if LATENT_MEMBER not in sample:
        raise DataError(
            f"The sample {sample['__key__']!r} has no latent.",
            where=sample["__url__"],
            mend="Give precomputed latents.",
        )
    return sample[LATENT_MEMBER]


def _only_encoder(sample: Sample, record: dict[str, torch.Tensor]) -> str:
    names = sorted(n.removeprefix("text.").removesuffix(".tokens") for n in record if n.endswith(".tokens"))
    if len(names) != 1:
        raise DataError(
            f"The latents hold {len(names)} text encoders: {', '.join(names) or 'none'}.",
            where=sample["__url__"],
            mend="Name the one to use.",
        )
    return names[0]


def _choices(seed: int, ids: list[SampleId], counts: Iterable[int]) -> list[int]:
    """Which of its captions each sample takes: a draw that belongs to the sample and its epoch."""
    draws = uniform(keys_of(seed, Purpose.CAPTION, ids)).tolist()
    return [min(math.floor(u * n), n - 1) for u, n in zip(draws, counts, strict=True)]
