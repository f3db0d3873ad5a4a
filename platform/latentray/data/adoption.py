"""Adopting WebDataset tars where they are: an index and a manifest for each split, and not a byte of the tars written.

A split is a choice of rows: the indexes of `train` and `validation` are over the same tars, and a sample is read by its byte
range. The driver holds the index twice while it makes it, some 200 bytes a sample.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentray.checkpoint import store
from latentray.config.build_shards import BuildShards
from latentray.data import index, sources
from latentray.data.parts import Part
from latentray.data.shard_plans import Taken
from latentray.data.survey import Survey
from latentray.errors import EnvironmentRefused

COLUMNS = ("key", "offset", "length", "crc32c", "sha256", "width", "height")
"""Of an adopted data set's index, beside `label` where some samples have one."""


def default_out(config: BuildShards) -> str:
    """Beside the tars. Raises EnvironmentRefused where that folder cannot be written."""
    base = sources.base_of(store.absolute(config.source.path or ""))
    if not store.is_remote(base) and store.exists(base) and not os.access(store.local_path(base), os.W_OK):
        raise EnvironmentRefused(
            "The index cannot be written beside the tars.", where=base, mend="Say where: out=<path or URI>."
        )
    return base


def adopt(taken: Taken, surveys: Sequence[Survey], parts: Sequence[Part], split: str) -> list[index.ShardResult]:
    """A split's index: of each tar that has samples in it, their rows, and where the tar is."""
    rows = taken.rows_of(split)
    part_N = taken.column("part")[rows]
    labelled = taken.table["label"].null_count < len(taken.table)
    table = taken.table.select([*COLUMNS, *(["label"] if labelled else [])])
    results = []
    for survey in surveys:
        held = rows[slice(*np.searchsorted(part_N, [survey.part, survey.part + 1]))]
        if not len(held):
            continue
        part = parts[survey.part]
        entry = index.ShardEntry(
            name=part.name, sha256=survey.tar_sha256, bytes=survey.tar_bytes, count=len(held), uri=part.uri
        )
        results.append(index.ShardResult(entry=entry, table=table.take(held)))
    return results


def repeated_keys(results: Sequence[index.ShardResult]) -> int:
    """Samples whose key an earlier one has too, in another tar: allowed, for samples are read by their place."""
    keys = pa.chunked_array([chunk for one in results for chunk in one.table["key"].chunks], pa.large_string())
    return len(keys) - pc.count_distinct(keys).as_py()
