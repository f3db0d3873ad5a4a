"""The job that packs pictures with captions into indexed data sets: Ray Data graphs of one row per part, and per shard.

The driver lists the input in parts; where it matters what is in them (filters, duplicates, tars), workers survey each part
first. The driver plans the shards; a worker packs a shard, uploads it and returns its index rows; the driver writes the
index, the list of rejects and, last, the manifest. A shard's name and bytes follow from its plan alone, so a retried task
writes the same shard again. Tars that are adopted are surveyed only: their index is made of the surveys.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentray.checkpoint import manifest, store
from latentray.config import compose
from latentray.config.build_shards import DRAWN, BuildShards
from latentray.data import adoption, index, sources, synthetic
from latentray.data import captions as caption_table
from latentray.data.filters import Filter
from latentray.data.packing import Packed, pack
from latentray.data.parts import Part
from latentray.data.shard_plans import SAMPLE_BYTES, ShardPlan, Taken, plan_drawn, plan_split, take
from latentray.data.survey import EXAMPLES, Reject, Survey, reads_files, split_draw, survey
from latentray.errors import DataError, InputMissing, LatentrayError
from latentray.reporting.progress import tracked

REJECTED = "rejected.jsonl"
CAPTIONS = "captions.arrow"
"""Sorted captions that replace those of the tars, below `out` while the job runs."""

_SPARE_BYTES = 16 << 20
_NOTHING = Taken(table=None, split_bound=0.0, rejected=[], filtered={}, examples=[], skipped={})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What a split is made of, ready to be committed."""

    uri: str
    results: list[index.ShardResult]
    rejected: list[Reject]
    planned: int
    """Samples that were neither filtered nor duplicates."""


def build(config: BuildShards) -> list[str]:
    """Build the data sets of a configuration and return their URIs, training first.

    Whatever can be known to be wrong with the input is refused before Ray starts (InputMissing, ConfigError, AlreadyExists,
    EnvironmentRefused). Raises DataError, with nothing committed, where more than `max_bad_fraction` is rejected.
    """
    out = _out(config)
    for split in synthetic.SPLITS:
        manifest.refuse_existing(store.join(out, split))
    written: set[str] = set()
    try:
        if config.source.name in DRAWN:
            uris = _build_drawn(config, out, written)
        else:
            uris = _build_read(config, out, written)
    except BaseException:
        _discard(out, written)
        raise
    print(f"Data sets: {' '.join(uris)}")
    if config.source.name not in ("moving_shapes", "gate"):
        print(f"Next: python -m jobs.train stage=autoencoder data={out}", flush=True)
    return uris


def _out(config: BuildShards) -> str:
    if config.out is None and config.source.index_only:
        return adoption.default_out(config)
    return store.absolute(config.out or f"runs/data/{config.source.name}")


def _build_drawn(config: BuildShards, out: str, written: set[str]) -> list[str]:
    counts = {"train": config.source.n, "validation": config.source.n_validation}
    plans = [p for split, n in counts.items() for p in plan_drawn(config, out, split, n)]
    store.require_space(out, sum(counts.values()) * SAMPLE_BYTES + _SPARE_BYTES)
    return _commit(config, _packed(config, out, plans, None, _NOTHING, written), _NOTHING, written)


def _build_read(config: BuildShards, out: str, written: set[str]) -> list[str]:
    parts = sources.parts(config.source)
    wanted = Filter(config.filter)
    if wanted.names:
        wanted.require_known(sources.columns(config.source, parts), where=config.source.path or "")
    with _sorted_captions(config, out) as captions:
        surveys = sorted(_surveyed(config, parts, captions), key=lambda one: one.part)
        taken = take(surveys, config)
        _tell_filtered(taken)
        _require_some(config, taken)
        if config.source.index_only:
            return _commit(config, _adopted(config, out, taken, surveys, parts), taken, written)
        plans = [p for split in synthetic.SPLITS for p in plan_split(config, out, split, taken, parts)]
        need = int(taken.column("bytes").sum()) + len(taken.table) * SAMPLE_BYTES
        store.require_space(out, need + _SPARE_BYTES)
        packed = _packed(config, out, plans, captions, taken, written)
        return _commit(config, packed, taken, written, parts[0].classes)


@contextlib.contextmanager
def _sorted_captions(config: BuildShards, out: str) -> Iterator[caption_table.Place | None]:
    if config.source.captions is None:
        yield None
        return
    uri = store.join(out, CAPTIONS)
    try:
        yield caption_table.sort(config.source, uri)
    finally:
        store.delete(uri)


def _surveyed(config: BuildShards, parts: Sequence[Part], captions: caption_table.Place | None) -> Iterable[Survey]:
    """The surveys of all parts: here where names and tables are enough, else by workers, as they finish."""
    if not reads_files(config):
        return [survey(number, part, config) for number, part in enumerate(parts)]
    jobs = [{"number": number, "part": dataclasses.asdict(part)} for number, part in enumerate(parts)]
    rows = _run(_survey_task, jobs, config, captions)
    return (Survey.from_bytes(row["result"]) for row in tracked(rows, len(jobs), "surveying the input"))


def _tell_filtered(taken: Taken) -> None:
    if taken.skipped:
        print(f"Members that are not decoded: {_listed(taken.skipped)}", flush=True)
    if not taken.filtered:
        return
    print(f"Left out: {_listed(taken.filtered)}", flush=True)
    for name, reason in taken.examples[:EXAMPLES]:
        print(f"  {reason}: {name}", flush=True)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {n}" for reason, n in sorted(counts.items(), key=lambda item: -item[1]))


def _require_some(config: BuildShards, taken: Taken) -> None:
    if len(taken.table):
        return
    if not taken.filtered and not taken.rejected:
        raise InputMissing("There are no samples in the tars.", where=config.source.path or "", mend="Check the path.")
    if taken.filtered:
        raise DataError(
            f"No sample is left: {_listed(taken.filtered)} by filters and as duplicates, {_weight(taken.rejected)} rejected.",
            where=config.source.path or "",
            mend="Loosen the settings under filter.",
        )
    _require_few(config, taken.rejected, 0, _weight(taken.rejected))


def _packed(
    config: BuildShards,
    out: str,
    plans: list[ShardPlan],
    captions: caption_table.Place | None,
    taken: Taken,
    written: set[str],
) -> dict[str, Built]:
    """Pack all plans on Ray; each split's shards, and its rejects of survey and packing."""
    written |= {store.join(plan.uri, plan.name) for plan in plans}
    jobs = [{"plan": dataclasses.asdict(plan)} for plan in plans]
    by_split: dict[str, list[Packed]] = {split: [] for split in synthetic.SPLITS}
    planned: collections.Counter[str] = collections.Counter()
    for plan in plans:
        planned[plan.split] += plan.count
    for row in tracked(_run(_pack_task, jobs, config, captions), len(jobs), "packing shards"):
        result = index.ShardResult.from_bytes(row["result"]) if row["result"] else None
        packed = Packed(result=result, **json.loads(row["about"]))
        by_split[packed.split].append(packed)
    built = {}
    for split, parts in by_split.items():
        surveyed = _rejected_of(split, taken, config)
        built[split] = Built(
            uri=store.join(out, split),
            results=[packed.result for packed in parts if packed.result is not None],
            rejected=surveyed + [reject for packed in parts for reject in packed.rejected],
            planned=planned[split] + _weight(surveyed),
        )
    return built


def _adopted(
    config: BuildShards, out: str, taken: Taken, surveys: Sequence[Survey], parts: Sequence[Part]
) -> dict[str, Built]:
    built = {}
    for split in synthetic.SPLITS:
        results = adoption.adopt(taken, surveys, parts, split)
        rejected = _rejected_of(split, taken, config)
        planned = sum(result.entry.count for result in results) + _weight(rejected)
        built[split] = Built(uri=store.join(out, split), results=results, rejected=rejected, planned=planned)
    repeated = adoption.repeated_keys([result for one in built.values() for result in one.results])
    if repeated:
        print(f"{repeated} samples have a key that an earlier one has too; they are told apart by their place.")
    return built


def _rejected_of(split: str, taken: Taken, config: BuildShards) -> list[Reject]:
    return [
        reject
        for reject in taken.rejected
        if (split_draw(reject["name"], config.seed) < taken.split_bound) == (split == "validation")
    ]


def _weight(rejected: Iterable[Reject]) -> int:
    """How many samples rejects stand for."""
    return sum(reject.get("samples", 1) for reject in rejected)


Task = Callable[[dict[str, Any], BuildShards, caption_table.Captions | None], tuple[bytes, dict[str, Any]]]
"""A job's work: Arrow bytes, whose types no block format bends, and what goes with them as JSON."""


def _survey_task(
    job: dict[str, Any], config: BuildShards, captions: caption_table.Captions | None
) -> tuple[bytes, dict[str, Any]]:
    return survey(job["number"], Part.of(job["part"]), config, captions).to_bytes(), {}


def _pack_task(
    job: dict[str, Any], config: BuildShards, captions: caption_table.Captions | None
) -> tuple[bytes, dict[str, Any]]:
    packed = pack(ShardPlan.of(job["plan"]), config, captions)
    result = packed.result.to_bytes() if packed.result else b""
    return result, {"split": packed.split, "rejected": packed.rejected}


def _row(
    row: dict[str, str], *, task: Task, config: BuildShards, captions: caption_table.Place | None
) -> dict[str, Any]:
    """A task for Ray Data. An error of ours passes as a value: Ray Data loses the cause of what a task raises."""
    try:
        opened = caption_table.Captions.open(captions) if captions else None
        result, about = task(json.loads(row["job"]), config, opened)
    except LatentrayError as error:
        return {"result": b"", "about": "", "error": pickle.dumps(error)}
    return {"result": result, "about": json.dumps(about), "error": b""}


def _run(
    task: Task, jobs: Sequence[dict[str, Any]], config: BuildShards, captions: caption_table.Place | None
) -> Iterator[dict[str, Any]]:
    """`task` for all jobs on Ray: rows of `result` and `about`, as they finish. Raises the first error of ours."""
    import ray.data

    from latentray.data import cluster

    cluster.connect(config.address)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after Ray Data's import, which sets its own
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"job": json.dumps(job)} for job in jobs]
    listed = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4096))
    for row in listed.map(_row, fn_kwargs={"task": task, "config": config, "captions": captions}).iter_rows():
        if row["error"]:
            raise pickle.loads(row["error"])
        yield row


def _commit(
    config: BuildShards, built: dict[str, Built], taken: Taken, written: set[str], classes: Sequence[str] = ()
) -> list[str]:
    """Write index, rejects and manifest of each split; refuse first where too much was rejected."""
    rejected = [reject for one in built.values() for reject in one.rejected]
    usable = len(built["train"].results) if "train" in built else 0
    _require_few(config, rejected, usable, sum(one.planned for one in built.values()))
    uris = []
    for split, one in _with_orphans(built).items():
        written |= {store.join(one.uri, name) for name in (manifest.NAME, index.NAME, REJECTED)}
        _commit_split(config, split, one, taken, classes)
        uris.append(one.uri)
    return uris


def _require_few(config: BuildShards, rejected: list[Reject], usable_shards: int, planned: int) -> None:
    count = _weight(rejected)
    if usable_shards and count <= config.max_bad_fraction * planned:
        return
    examples = "; ".join(f"{r['name']} ({r['reason']})" for r in rejected[:5])
    raise DataError(
        f"{count} of {planned} pictures cannot be used ({_listed(_counts(rejected))}); "
        f"max_bad_fraction is {config.max_bad_fraction:g}. First: {examples}.",
        where=config.source.path or "",
        mend="Mend or remove these pictures, or raise max_bad_fraction.",
    )


def _with_orphans(built: dict[str, Built]) -> dict[str, Built]:
    """The splits that have shards; the rejects of one that has none are listed with the training split's."""
    kept = {split: one for split, one in built.items() if one.results}
    for split, one in built.items():
        if split in kept:
            continue
        if one.planned:
            print(f"{split}: every picture was rejected, so there is no {one.uri}")
        train = kept["train"]
        kept["train"] = dataclasses.replace(
            train, rejected=train.rejected + one.rejected, planned=train.planned + one.planned
        )
    return kept


def _commit_split(config: BuildShards, split: str, built: Built, taken: Taken, classes: Sequence[str]) -> None:
    rejected = sorted(built.rejected, key=lambda r: r["name"])
    with store.staging() as folder:
        index.write(built.results, folder / index.NAME)
        (folder / REJECTED).write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in rejected))
        files = {name: manifest.entry_of(folder / name) for name in (index.NAME, REJECTED)}
        for name in files:
            store.upload(folder / name, store.join(built.uri, name))
    for result in built.results:
        if not result.entry.uri:
            files[result.entry.name] = manifest.FileEntry(size=result.entry.bytes, sha256=result.entry.sha256)
    meta: dict[str, Any] = {
        "source": config.source.name,
        "split": split,
        "seed": config.seed,
        "samples": sum(result.entry.count for result in built.results),
        "planned": built.planned,
        "rejected": dict(sorted(_counts(rejected).items())),
        "filtered": taken.filtered,
        "skipped_members": taken.skipped,
    }
    if config.source.name == "shapes":
        meta["unseen"] = [synthetic.caption(kind) for kind in synthetic.UNSEEN]
    if classes:
        meta["classes"] = list(classes)
    manifest.seal(built.uri, files, kind="dataset", config=compose.to_dict(config), meta=meta)
    print(
        f"{split}: {meta['samples']} samples in {len(built.results)} shards, {_weight(rejected)} rejected", flush=True
    )


def _counts(rejected: Iterable[Reject]) -> collections.Counter[str]:
    """Reason -> samples."""
    counts: collections.Counter[str] = collections.Counter()
    for reject in rejected:
        counts[reject["reason"]] += reject.get("samples", 1)
    return counts


def _discard(out: str, written: set[str]) -> None:
    """Remove what a failed build wrote, manifests first: both splits are there, or none."""
    for uri in sorted(written, key=lambda uri: not uri.endswith(manifest.NAME)):
        store.delete(uri)
    if not store.is_remote(out):
        for split in synthetic.SPLITS:
            _remove_if_empty(store.local_path(store.join(out, split)))


def _remove_if_empty(path: Path) -> None:
    for folder in (path, path.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
