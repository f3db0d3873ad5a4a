"""Finding records in an older latent store by what they were made from: the file's sha256, the variant and the shape."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from latentray.data.latent_plan import VARIANTS, Ints
from latentray.data.latents import KIND, describe
from latentray.data.shards import IndexedShards
from latentray.errors import DataError, FingerprintMismatch

Digests = npt.NDArray[np.uint8]
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """The units that a store holds, sorted for search: some 60 bytes each."""

    uri: str
    digest: str
    """Of the store's manifest."""
    digests: Digests
    """(records, 32): sha256 of each record's picture or clip."""
    variants: Ints
    shapes: Ints
    """(records, 2): height and width."""
    order: Ints
    words: npt.NDArray[np.uint64]
    """A word of each unit, ascending; `order` gives the records."""

    @classmethod
    def of(cls, digests: Digests, variants: Ints, shapes: Ints, *, uri: str = "", digest: str = "") -> Held:
        words = _words(digests, variants)
        order = np.argsort(words, kind="stable")
        return cls(
            uri=uri,
            digest=digest,
            digests=digests,
            variants=variants,
            shapes=shapes,
            order=order,
            words=words[order],
        )

    @classmethod
    def open(cls, uri: str, key: str) -> Held:
        """The units of the store at a URI. Raises FingerprintMismatch where other encoders or settings made it."""
        opened = IndexedShards.open(uri, kind=KIND)
        described = describe(opened.uri, opened.manifest)
        if described.key != key:
            raise FingerprintMismatch(
                "These latents cannot be reused: another autoencoder, text encoder, size or number type made them "
                f"(key {described.key[:12]}; this job's is {key[:12]}).",
                where=opened.uri,
                mend="Leave reuse out, or give latents that were made with the same settings.",
            )
        variants = opened.column("variant").to_numpy().astype(np.int64)
        digests = digests_of(opened, "source_sha256")
        shapes = np.stack([opened.index.numbers(name) for name in ("height", "width")], axis=1).astype(np.int64)
        return cls.of(digests, variants, shapes, uri=opened.uri, digest=opened.manifest.digest)

    def rows(self, digests: Digests, variants: Ints, shapes: Ints) -> Ints:
        """The record of each unit asked for, -1 where there is none."""
        if not len(self.words):
            return np.full(len(digests), -1, np.int64)
        asked = _words(digests, variants)
        at = np.minimum(np.searchsorted(self.words, asked), len(self.words) - 1)
        found = self.order[at]
        same = (self.digests[found] == digests).all(axis=1) & (self.variants[found] == variants)
        same &= (self.shapes[found] == shapes).all(axis=1)
        return np.where(same, found, -1)


def units_held(held: Held, digests: Digests, units: Ints, shapes: Ints) -> Ints:
    """The record of each unit of a data set with these digests, wanted at these shapes, -1 where there is none."""
    rows, variants = np.divmod(units, VARIANTS)
    return held.rows(digests[rows], variants, shapes)


def digests_of(opened: IndexedShards, column: str) -> Digests:
    """(samples, 32) of an index's column of digests. Raises DataError where it has none."""
    if column not in opened.columns:
        raise DataError(
            "Nothing can be reused: the index does not record the digests of the pictures.",
            where=opened.uri,
            mend="Build the data set with build_shards, or leave reuse out.",
        )
    joined = b"".join(opened.column(column).to_pylist())
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def _words(digests: Digests, variants: Ints) -> npt.NDArray[np.uint64]:
    heads = np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
    return heads ^ (variants.astype(np.uint64) * _ODD)
