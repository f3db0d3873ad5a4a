"""Plans of shards: greedy, in order, within bounds; splits that stay where they are."""

import dataclasses
import itertools
import json

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.config.build_shards import BuildShards, SourceConfig
from latentray.data import shard_plans, survey
from latentray.data.parts import Part


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 10), st.integers(1, 80))
def test_no_stretch_exceeds_its_bounds_unless_one_sample_does(sizes, most, most_bytes):
    found = list(shard_plans.stretches(np.array(sizes, np.int64), most=most, most_bytes=most_bytes))
    assert [x for stretch in found for x in stretch] == list(range(len(sizes)))
    for stretch in found:
        assert 1 <= len(stretch) <= most
        assert len(stretch) == 1 or sum(sizes[x] for x in stretch) <= most_bytes
    for stretch, after in itertools.pairwise(found):  # greedy: the next sample would not have fitted
        assert len(stretch) == most or sum(sizes[x] for x in stretch) + sizes[after[0]] > most_bytes


def held(names, fraction: float, seed: int = 0) -> set[str]:
    draws = np.array([survey.split_draw(name, seed) for name in names])
    bound = shard_plans.split_bound(draws, fraction)
    return {name for name, draw in zip(names, draws, strict=True) if draw < bound}


def test_the_split_is_stable_and_never_empty():
    many = [f"{i}.png" for i in range(2000)]
    part = held(many, 0.1)
    assert 150 < len(part) < 250
    assert part & set(many[:1000]) == held(many[:1000], 0.1)
    assert held(many, 0.1, seed=1) != part
    assert {len(held(many[:2], fraction)) for fraction in (0.0001, 0.999)} == {1}
    assert held(many, 0.0) == held(many[:1], 0.5) == set()
    assert len(held(many[:200], 0.02)) >= 8  # enough for FID to exist
    twice = held([*many[:5], *many[:5]], 0.3)
    assert twice == held(many[:5], 0.3)


def surveyed(part: int, n: int, **about) -> survey.Survey:
    rows = [{"row": i, "draw": 0.5, "bytes": 100, "offset": i * 10, "length": 10, "crc32c": i} for i in range(n)]
    config = BuildShards(source=SourceConfig(name="webdataset", path="x"))
    table = pa.Table.from_pylist(rows, survey.schema_of(config))
    found = {"rejected": [], "filtered": {}, "examples": [], "skipped": {}} | about
    return survey.Survey(part=part, table=table, **found)


def test_plans_cross_as_json_and_take_each_sample_once_in_order():
    config = BuildShards(source=SourceConfig(name="webdataset", path="x"), samples_per_shard=7, validation_fraction=0.0)
    parts = [Part(uri=f"{n}.tar", name=f"{n}.tar") for n in range(3)]
    taken = shard_plans.take([surveyed(2, 4), surveyed(0, 10), surveyed(1, 1)], config)
    plans = list(shard_plans.plan_split(config, "out", "train", taken, parts))
    assert [plan.count for plan in plans] == [7, 7, 1]
    assert [plan.first for plan in plans] == [0, 7, 14]
    rows = [(piece.part.uri, row) for plan in plans for piece in plan.pieces for row in piece.rows]
    assert rows == [(f"{n}.tar", row) for n, count in ((0, 10), (1, 1), (2, 4)) for row in range(count)]
    crossed = [shard_plans.ShardPlan.of(json.loads(json.dumps(dataclasses.asdict(plan)))) for plan in plans]
    assert [c.pieces[0].part for c in crossed] == [p.pieces[0].part for p in plans]
    assert [tuple(place) for place in crossed[1].pieces[0].places] == plans[1].pieces[0].places
    assert list(shard_plans.plan_split(config, "out", "validation", taken, parts)) == []


def test_a_cut_tar_counts_as_what_it_lacks_of_the_usual():
    cut = {"name": "1.tar", "reason": "damaged_tar", "what": "", "samples": 1}
    surveys = [surveyed(0, 10), surveyed(1, 3, rejected=[cut]), surveyed(2, 10), surveyed(3, 8, filtered={"where": 2})]
    config = BuildShards(source=SourceConfig(name="webdataset", path="x"))
    (found,) = shard_plans.take(surveys, config).rejected
    assert found["samples"] == 7


def test_a_survey_crosses_as_bytes():
    one = surveyed(3, 2, examples=[("a", "where")], filtered={"where": 1}, rejected=[{"name": "\udcff", "reason": "r"}])
    crossed = survey.Survey.from_bytes(one.to_bytes())
    assert crossed.table.equals(one.table)
    assert dataclasses.replace(crossed, table=None) == dataclasses.replace(one, table=None)
