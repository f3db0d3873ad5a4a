"""Shards without an index: each sample once where that is promised, equal steps, bounded memory, nothing unsafe."""

import collections
import functools
import io
import itertools
import json
import pickle
import tarfile
import types

import numpy as np
import pytest
import torch
from gray_shards import place_of, png, run, write_shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.data import stream, stretches, tars
from latentray.data.blocks import BlockCache
from latentray.data.stream import ShardOrder, StreamPlace, StreamSource, stream_batches
from latentray.data.transforms import Augment
from latentray.errors import ConfigError, DataError, InputMissing, UnsafeMember


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("even"), [6] * 12)


def test_a_picture_and_its_caption_stay_together(even):
    seen = set()
    for batch in run(even, steps=18):
        assert batch.x_BCHW.shape == (4, 3, 8, 8) and batch.weight_B.tolist() == [1.0] * 4
        for row, one in enumerate(batch.ids):
            shard, number = place_of(one)
            assert batch.captions[row] == f"shard {shard} sample {number}"
            assert round((batch.x_BCHW[row, 0, 0, 0].item() + 1) * 127.5) == 20 + 10 * shard + number
            seen.add((shard, number))
    assert seen == set(itertools.product(range(12), range(6)))


class Pictures:
    """A StreamSource of tars in memory, read as one of a rank's loader workers would."""

    def __init__(self, monkeypatch, counts, order, *, world, workers, last_step, shuffle):
        self.members = {f"/set/{n:05d}.tar": count for n, count in enumerate(counts)}
        monkeypatch.setattr(stretches, "opened", self.opened)
        self.make = functools.partial(
            StreamSource,
            list(self.members),
            order,
            world=world,
            last_step=last_step,
            shuffle=(shuffle, 1 << 20),
            sha256={},
            skip_damaged=False,
            blocks=types.SimpleNamespace(traffic=lambda: None),
        )
        self.patch, self.world, self.workers = monkeypatch, world, workers

    def opened(self, uri, blocks):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i in range(self.members[uri]):
                tar.addfile(tarfile.TarInfo(f"{i}.txt"))
        data = buffer.getvalue()
        return _Given(stretches.Tar(lambda offset, length: data[offset : offset + length], len(data)))

    def readers(self):
        """What each reader is given: (epoch, shard, number, step) of each sample."""
        for rank in range(self.world):
            for worker in range(self.workers):
                info = types.SimpleNamespace(id=worker, num_workers=self.workers)
                self.patch.setattr(stream, "get_worker_info", lambda info=info: info)
                yield [
                    (one["__id__"].epoch, *place_of(one["__id__"]), one["__step__"]) for one in self.make(rank=rank)()
                ]


class _Given:
    def __init__(self, tar):
        self.tar = tar

    def __enter__(self):
        return self.tar

    def __exit__(self, *error):
        return None


@settings(deadline=None, max_examples=60)
@given(
    each=st.integers(1, 9),
    world=st.integers(1, 4),
    workers=st.integers(1, 3),
    times=st.integers(1, 3),
    per_reader=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    shuffle=st.integers(1, 30),
    epochs=st.integers(1, 3),
)
def test_each_sample_once_an_epoch_where_readers_divide_equal_shards(
    each, world, workers, times, per_reader, seed, shuffle, epochs
):
    readers = world * workers
    shards, batch = readers * times, readers * per_reader
    steps = epochs * shards * each // batch
    with pytest.MonkeyPatch.context() as patch:
        order = ShardOrder(seed=seed, batches=(batch,))
        made = Pictures(patch, [each] * shards, order, world=world, workers=workers, last_step=steps, shuffle=shuffle)
        found = [one for some in made.readers() for one in some]
    for epoch in range(steps * batch // (shards * each)):
        mine = sorted((shard, number) for e, shard, number, _ in found if e == epoch)
        assert mine == list(itertools.product(range(shards), range(each)))
    assert [sum(step == t for *_, step in found) for t in range(steps)] == [batch] * steps


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    world=st.integers(1, 3),
    workers=st.integers(1, 2),
    seed=st.integers(0, 2**40),
    shuffle=st.integers(1, 20),
)
def test_uneven_shards_are_still_dealt_without_overlap_or_rest_and_each_reader_goes_epoch_by_epoch(
    counts, world, workers, seed, shuffle
):
    readers = world * workers
    if readers > len(counts):
        return
    steps = 2 * sum(counts)  # every reader goes through two epochs at least
    with pytest.MonkeyPatch.context() as patch:
        order = ShardOrder(seed=seed, batches=(readers,))
        made = Pictures(patch, counts, order, world=world, workers=workers, last_step=steps, shuffle=shuffle)
        by_reader = list(made.readers())
    for epoch in (0, 1):
        once = sorted((shard, i) for some in by_reader for e, shard, i, _ in some if e == epoch)
        assert once == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    for some in by_reader:
        assert [e for e, *_ in some] == sorted(e for e, *_ in some)
        assert [t for *_, t in some] == list(range(steps))  # a slot each


def test_the_order_is_one_of_seed_and_epoch():
    one, other = ShardOrder(seed=1, batches=(4,)), ShardOrder(seed=2, batches=(4,))
    assert one.of(0, 40, 0, 1) == one.of(0, 40, 0, 1)
    assert sorted(one.of(5, 40, 0, 1)) == list(range(40))
    orders = [tuple(order.of(epoch, 40, 0, 1)) for order in (one, other) for epoch in range(3)]
    assert len(set(orders)) == 6
    assert sorted(one.of(2, 40, 0, 3) + one.of(2, 40, 1, 3) + one.of(2, 40, 2, 3)) == list(range(40))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=80), most=st.integers(1, 20), most_bytes=st.integers(1, 200))
def test_the_shuffle_buffer_holds_no_more_than_it_may_and_loses_nothing(sizes, most, most_bytes):
    inside, worst = [0, 0], [0, 0]

    def samples():
        for i, size in enumerate(sizes):
            inside[0], inside[1] = inside[0] + 1, inside[1] + size
            worst[:] = [max(a, b) for a, b in zip(worst, inside, strict=True)]
            yield {"__key__": i, "txt": bytes(size)}

    out = []
    for one in ShardOrder(seed=1, batches=(4,)).shuffled(samples(), 0, 0, (most, most_bytes)):
        inside[0], inside[1] = inside[0] - 1, inside[1] - len(one["txt"])
        out.append(one["__key__"])
    assert sorted(out) == list(range(len(sizes)))
    assert worst[0] <= most + 1  # what has just come in
    assert worst[1] <= most_bytes + max(sizes, default=0)


def test_a_buffer_as_large_as_the_set_shuffles_it_well():
    n, draws = 12, 600
    places = np.zeros((n, n))
    for seed in range(draws):
        samples = iter([{"__key__": i} for i in range(n)])
        for place, one in enumerate(ShardOrder(seed=seed, batches=(1,)).shuffled(samples, 0, 0, (n, 1))):
            places[one["__key__"], place] += 1
    deviation = ((places - draws / n) ** 2 / (draws / n)).sum()
    assert deviation < (n - 1) ** 2 + 4 * np.sqrt(2 * (n - 1) ** 2)  # chi squared, four standard deviations


def test_of_a_tar_two_stretches_are_in_memory(monkeypatch):
    monkeypatch.setattr(stretches, "STRETCH", 4096)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(200):
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = 100 + 37 * i
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
    data, asked = buffer.getvalue(), []

    def read(offset, length):
        asked.append(length)
        return data[offset : offset + length]

    opened = stretches.Tar(read, len(data))
    for i, one in enumerate(tars.samples(opened, shard="x", skipped=collections.Counter())):
        begin, size = one.places["txt"]
        assert opened[begin : begin + size] == bytes([i]) * (100 + 37 * i)
        assert sum(len(part) for _, part in opened._held) <= 2 * max(4096, 512 + 100 + 37 * i + 512)
    assert sum(asked) < 2.5 * len(data)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_take_equal_steps_though_their_shards_are_not(tmp_path, world):
    uris = write_shards(tmp_path, [9, 1, 5, 2, 7, 1])
    for rank in range(world):
        made = run(uris, steps=15, world=world, rank=rank)
        assert [len(batch.ids) for batch in made] == [4 // world] * 15


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_real_loader_workers_read_each_sample_once(even):
    found = [one for batch in run(even, steps=12, batch=6, workers=3) for one in batch.ids]
    assert sorted(map(place_of, found)) == list(itertools.product(range(12), range(6)))
    assert {one.epoch for one in found} == {0}


def test_what_is_drawn_for_a_sample_does_not_depend_on_who_reads_it(even):
    def drawn(world):
        made = [run(even, steps=18, world=world, rank=r, augment=Augment(flip=True)) for r in range(world)]
        return {one: x for some in made for batch in some for one, x in zip(batch.ids, batch.x_BCHW, strict=True)}

    alone, four = drawn(1), drawn(4)
    assert alone.keys() == four.keys()
    assert all(torch.equal(alone[one], four[one]) for one in alone)
    mirrored = [(x[0, 0, 0] < x[0, 0, -1]).item() for x in alone.values()]
    assert 0.2 < np.mean(mirrored) < 0.8


def test_after_a_resume_every_sample_of_its_epoch_comes_at_least_once_in_another_order(even):
    place = StreamPlace()
    first = []
    for batch in run(even, steps=25):
        place = place.after(batch)
        first += batch.ids
    assert place == StreamPlace(epoch=1, steps=25)
    again = run(even, steps=25 + 18, place=StreamPlace.from_dict(json.loads(json.dumps(place.to_dict()))))
    assert len(again) == 18
    everything = set(itertools.product(range(12), range(6)))
    assert {place_of(one) for batch in again for one in batch.ids if one.epoch == 1} == everything
    assert {place_of(one) for one in first if one.epoch == 0} == everything
    begun = [place_of(one) for one in first if one.epoch == 1]
    assert [place_of(one) for batch in again for one in batch.ids][: len(begun)] != begun


@settings(deadline=None, max_examples=25)
@given(
    counts=st.lists(st.integers(1, 5), min_size=4, max_size=8),
    lives=st.lists(st.tuples(st.integers(1, 12), st.sampled_from([1, 2, 3, 4])), min_size=2, max_size=5),
    seed=st.integers(0, 1000),
)
def test_whatever_stops_it_no_sample_of_a_finished_epoch_was_left_out(counts, lives, seed):
    """Lives of so many steps at so many ranks; all take up at the least place of the last."""
    place, seen = StreamPlace(), set()
    for steps, world in lives:
        order = ShardOrder(seed=seed, batches=(12,), place=place)
        last = place.steps + steps
        with pytest.MonkeyPatch.context() as patch:
            made = Pictures(patch, counts, order, world=world, workers=1, last_step=last, shuffle=7)
            ranks = list(made.readers())
        seen |= {one[:3] for some in ranks for one in some}
        ends = [StreamPlace(epoch=min(e for e, *_, t in some if t == last - 1), steps=last) for some in ranks]
        place = StreamPlace.least(ends)
    for epoch in range(place.epoch):
        wanted = {(epoch, shard, i) for shard, count in enumerate(counts) for i in range(count)}
        assert wanted <= seen


def test_without_an_end_it_never_ends(even):
    batches = stream_batches(even, seed=0, global_batch=8, shape=(8, 8), augment=Augment())
    epochs = {one.epoch for batch in itertools.islice(batches, 40) for one in batch.ids}
    assert epochs == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", ["a.pyd", "a.pkl", "../a.png", "/etc/a.png"])
def test_a_member_that_could_run_code_or_leaves_the_shard_is_always_refused(tmp_path, skip, name):
    write_tar(tmp_path / "0.tar", [("0.png", png(20)), (name, b"x")])
    with pytest.raises(UnsafeMember) as caught:
        run([str(tmp_path / "0.tar")], steps=5, batch=1, skip_damaged=skip, max_bad_fraction=1.0)
    assert caught.value.where.endswith("0.tar")


@pytest.mark.parametrize("uri", ["pipe:cat x.tar", "x.tar::pipe:id", "{pipe:id,x}.tar", " PIPE:id"])
def test_no_url_runs_a_shell(uri, tmp_path):
    with pytest.raises(UnsafeMember):
        stream_batches([uri], seed=0, global_batch=1, shape=(8, 8), augment=Augment())


def test_members_of_other_kinds_are_left_out(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.npy", b"3"), ("0.png", png(40)), ("0.txt", b"x"), ("readme.md", b"y")])
    (batch,) = run([str(tmp_path / "0.tar")], steps=1, batch=1)
    assert batch.captions == ["x"]


def test_shards_are_named_by_tars_folders_and_patterns(tmp_path):
    uris = write_shards(tmp_path, [1, 1, 1])
    (tmp_path / "notes.txt").write_text("x")
    assert stream.expand([str(tmp_path)]) == uris
    assert stream.expand([f"{tmp_path}/{{00000..00002}}.tar"]) == uris
    assert stream.expand([uris[2], uris[0]]) == [uris[2], uris[0]]
    with pytest.raises(ConfigError, match="twice"):
        stream.expand([uris[0], str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputMissing, match="no shards"):
        stream.expand([str(tmp_path / "empty")])


def test_what_does_not_fit_is_refused(even):
    with pytest.raises(ConfigError, match="2 shards are too few for 4 ranks"):
        run(even[:2], world=4)
    with pytest.raises(ConfigError, match="do not divide"):
        run(even, world=3)
    with pytest.raises(ConfigError, match="shuffle"):
        run(even, shuffle=0)


def test_a_sample_larger_than_the_buffer_is_refused_or_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("0.png", png(20)), ("1.png", png(30) + bytes(9000)), ("2.png", png(40))])
    uris = [str(tmp_path / "0.tar")]
    with pytest.raises(ConfigError, match="shuffle_bytes"):
        run(uris, batch=1, shuffle_bytes=5000)
    found = [
        one for batch in run(uris, steps=3, batch=1, shuffle_bytes=5000, skip_damaged=True) for one in batch.damaged
    ]
    assert [(one.key, one.reason) for one in found] == [("1", "too_many_bytes")]


def test_pictures_that_do_not_decode_keep_their_places_and_too_many_end_the_run(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for n in range(4):
        members = [(f"{n}-{i}.png", png(20) if i % 3 else b"\x89PNG\r\n\x1a\nnothing") for i in range(12)]
        write_tar(folder / f"{n}.tar", members)
    made = run([str(folder)], steps=12, skip_damaged=True, max_bad_fraction=0.4)
    for batch in made:
        bad = [place_of(one)[1] % 3 == 0 for one in batch.ids]
        assert batch.weight_B.tolist() == [0.0 if one else 1.0 for one in bad]
        assert len(batch.damaged) == sum(bad)
    assert sum(len(batch.damaged) for batch in made) == 16
    with pytest.raises(DataError, match="damage.max_bad_fraction is 0.05"):
        run([str(folder)], steps=12, skip_damaged=True, max_bad_fraction=0.05)
    with pytest.raises(DataError, match="cannot be decoded"):
        run([str(folder)], steps=12)


def test_a_reader_without_a_sound_sample_ends_the_run(tmp_path):
    (uri,) = write_shards(tmp_path, [3])
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="Of the 1 shards") as caught:
        run([uri], steps=20, skip_damaged=True, max_bad_fraction=1.0)
    assert caught.value.where == uri


def test_the_source_can_be_sent_to_a_fresh_process(even, tmp_path):
    source = StreamSource(
        even,
        ShardOrder(seed=3, batches=(4,)),
        rank=0,
        world=1,
        last_step=3,
        shuffle=(10, 1 << 20),
        sha256={},
        skip_damaged=False,
        blocks=BlockCache(tmp_path, capacity_bytes=1 << 20),
    )
    sent = pickle.loads(pickle.dumps(source))
    assert [one["__id__"] for one in sent()] == [one["__id__"] for one in source()]
