"""Buckets: which shapes there are, who belongs where, and that each sample of a bucket is found by its number."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import buckets, index
from latentray.data.buckets import Bucket, Bucketed
from latentray.errors import ConfigError, DataError


def square_wide_tall(size: int = 64, batch: int = 4) -> tuple[Bucket, ...]:
    half, double = size // 2, size * 2
    shapes = [(size, size), (half, double), (double, half)]
    return tuple(Bucket(size=size, height=h, width=w, batch=batch) for h, w in shapes)


def test_shapes_of_a_resolution_fit_into_its_pixels_and_step():
    found = buckets.shapes(1024, step=64, max_aspect=4)
    assert (1024, 1024) in found
    assert (512, 2048) in found
    assert {(w, h) for h, w in found} == set(found)
    for height, width in found:
        assert height % 64 == width % 64 == 0
        assert 0.85 * 1024**2 < height * width <= 1024**2
        assert max(height, width) / min(height, width) <= 4


def test_batches_have_about_equally_many_pixels():
    made = buckets.table([256, 512], step=64, max_aspect=2, pixel_budget=96 * 256 * 256, multiple=6)
    assert {one.size for one in made} == {256, 512}
    for one in made:
        assert one.batch % 6 == 0
        pixels = one.batch * one.height * one.width
        assert pixels <= 96 * 256 * 256 < pixels + 6 * one.height * one.width


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"sizes": [100]}, "buckets.sizes"),
        ({"pixel_budget": 1000}, "buckets.multiple"),
        ({"sizes": [2048], "step": 8, "max_aspect": 8, "pixel_budget": 10**12}, "buckets.step"),
    ],
)
def test_impossible_tables_are_refused(change, where):
    with pytest.raises(ConfigError) as caught:
        buckets.table(**{"sizes": [128], "step": 64, "max_aspect": 2, "pixel_budget": 10**6, "multiple": 2} | change)
    assert caught.value.where == where


def test_a_picture_goes_to_the_nearest_aspect_in_the_logarithm():
    table = square_wide_tall()  # aspects 1, 4, 1/4: the edges are at 2 and 1/2
    got = buckets.assign([100, 199, 201, 50, 49, 500], [100, 100, 100, 99, 100, 100], table)
    assert got.tolist() == [0, 0, 1, 0, 2, 1]


def test_a_picture_goes_to_the_greatest_resolution_it_fills():
    table = (*square_wide_tall(64), *square_wide_tall(256))
    got = buckets.assign([63, 255, 256, 4000, 1024], [63, 255, 256, 4000, 256], table)
    assert got.tolist() == [0, 0, 3, 3, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30), st.randoms())
def test_latents_go_to_the_bucket_of_their_very_shape(shapes, random):
    table = buckets.table_of(random.sample(sorted(set(shapes)), len(set(shapes))), pixel_budget=1600, multiple=1)
    height, width = np.array(shapes).T
    got = [table[number] for number in buckets.exact(width, height, table)]
    assert [(one.height, one.width) for one in got] == shapes
    assert all(one.batch == 1600 // (one.height * one.width) for one in got)
    with pytest.raises(DataError, match="41x41"):
        buckets.exact([*width, 41], [*height, 41], table)


def test_stored_shapes_share_a_budget_of_pixels():
    made = buckets.table_of([(256, 256), (512, 512), (384, 640)], pixel_budget=96 * 512 * 512, multiple=24)
    assert [one.batch for one in made] == [384, 96, 96]
    assert [one.size for one in made] == [256, 512, 496]
    with pytest.raises(ConfigError) as caught:
        buckets.table_of([(512, 512)], pixel_budget=8 * 512 * 512, multiple=24)
    assert caught.value.where == "buckets.multiple"
    assert "global_batch_size" in caught.value.mend


def write_index(path, shapes_by_shard):
    results = []
    for number, shapes in enumerate(shapes_by_shard):
        rows = [
            {"key": f"{number}-{i}", "offset": 512 * i, "length": 512, "crc32c": 0, "width": w, "height": h}
            for i, (h, w) in enumerate(shapes)
        ]
        entry = index.ShardEntry(
            name=f"{number:05d}.tar", sha256=hashlib.sha256().hexdigest(), bytes=512 * len(rows), count=len(rows)
        )
        results.append(index.ShardResult.of(entry, rows))
    index.write(results, path)
    return index.Index(path)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([(64, 64), (60, 66), (32, 130), (140, 30)]), min_size=1, max_size=9),
        min_size=1,
        max_size=6,
    )
)
def test_every_number_of_a_bucket_is_another_sample_of_it(tmp_path_factory, shapes):
    opened = write_index(tmp_path_factory.mktemp("index") / index.NAME, shapes)
    found = Bucketed(opened, "digest", square_wide_tall())
    flat = [shape for shard in shapes for shape in shard]
    wanted = buckets.assign([w for _, w in flat], [h for h, _ in flat], found.buckets)
    assert sum(found.counts) == len(flat)
    for bucket, count in enumerate(found.counts):
        got = found.index(bucket, np.arange(count)[::-1]).tolist()
        assert got[::-1] == np.flatnonzero(wanted == bucket).tolist()
