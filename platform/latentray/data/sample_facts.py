"""What indexes say of samples that a denoiser is told beside their captions: sizes and class labels. No member is read for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latentray.data.latents import CONDITIONS, LABEL
from latentray.data.shards import IndexedShards
from latentray.errors import ConfigError, DataError
from latentray.records import SampleId


class SampleFacts:
    """Columns of the indexes of a run's data sets, looked up by sample."""

    def __init__(self, sets: Sequence[IndexedShards]) -> None:
        self._sizes = _columns(sets, (*CONDITIONS, "height", "width"))
        self._labels = _columns(sets, (LABEL,))

    def sizes(self, ids: Sequence[SampleId]) -> torch.Tensor | None:
        """(B, 6) float32: SDXL's; None where an index does not say it."""
        return _looked_up(self._sizes, ids, np.dtype(np.float32))

    def labels(self, ids: Sequence[SampleId]) -> torch.Tensor | None:
        """(B,) int64 class labels, or None."""
        found = _looked_up(self._labels, ids, np.dtype(np.int64))
        return None if found is None else found[:, 0]


def require_labels(sets: Sequence[IndexedShards], *, classes: int) -> None:
    """Raise ConfigError where a data set gives no labels, one beyond the classes or classes of other names than the first;
    DataError where some samples lack one."""
    for one in sets:
        if LABEL not in one.columns:
            raise ConfigError(
                "The data set gives no class labels.",
                where="denoiser.classes",
                mend='Build it with source.label, give its pictures a "label" in their .json, or set it to null.',
            )
        labels = one.index.numbers(LABEL)
        missing, greatest = int((labels < 0).sum()), int(labels.max(initial=-1))
        if missing:
            raise DataError(
                f"{missing} of {len(labels)} samples have no class label.",
                where=one.uri,
                mend="Build the data set again without them, or with a label for each.",
            )
        if greatest >= classes:
            raise ConfigError(
                f"A sample has the label {greatest}, and there are {classes} classes, numbered from 0.",
                where="denoiser.classes",
                mend=f"Set it to {greatest + 1} or more.",
            )
        if class_names(one) != class_names(sets[0]):
            raise ConfigError(
                "The data sets name their classes differently.",
                where=f"{sets[0].uri} and {one.uri}",
                mend="Build them from the same classes.",
            )


def class_names(opened: IndexedShards) -> tuple[str, ...]:
    """Of the labels, in their order; none where the data set does not name them."""
    return tuple(opened.manifest.meta.get("classes", ()))


def _columns(sets: Sequence[IndexedShards], names: Sequence[str]) -> list[list[np.ndarray]]:
    """For each data set its columns; none at all where one lacks some."""
    if not all(set(names) <= set(one.columns) for one in sets):
        return []
    return [[one.index.numbers(name) for name in names] for one in sets]


def _looked_up(columns: list[list[np.ndarray]], ids: Sequence[SampleId], dtype: np.dtype) -> torch.Tensor | None:
    """(B, names), or None without columns."""
    if not columns:
        return None
    of, at = np.array([(one.dataset, one.index) for one in ids], np.int64).T
    told = np.empty((len(ids), len(columns[0])), dtype)
    for number, named in enumerate(columns):
        mine = of == number
        told[mine] = np.stack([column[at[mine]] for column in named], axis=1)
    return torch.from_numpy(told)
