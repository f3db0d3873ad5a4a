"""Clips in the order of training: the windows that the draws say, whatever reads them; damage keeps its place."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from latentray.checkpoint import manifest
from latentray.data import clips, index, shards
from latentray.data.clip_batches import clip_batches, require_long_enough, starts_of
from latentray.data.ordering import Order
from latentray.data.pipeline import OrderedSource
from latentray.data.transforms import Augment
from latentray.errors import ConfigError, DataError, DigestMismatch, SampleRejected

N, B, T, LENGTH, FPS = 18, 6, 4, 12, 8.0


def numbered(i: int, length: int = LENGTH) -> np.ndarray:
    """Frame t of clip i is the gray 10 i + t, brighter by 3 on the left: clip, frame and mirroring can be read back."""
    frames = np.zeros((length, 8, 12, 3), np.uint8)
    frames += (10 * i + np.arange(length, dtype=np.uint8))[:, None, None, None]
    frames[:, :, :6] += 3
    return frames


def publish(root, made):
    folder = root / "built"
    folder.mkdir(parents=True)
    results = [shards.write_shard(made[i::3], folder / shards.shard_name(i)) for i in range(3)]
    index.write(results, folder / index.NAME)
    manifest.publish(folder, root / "set", kind="dataset")
    return shards.IndexedShards.open(root / "set")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    made = [clips.clip_sample(f"{i:05d}", numbered(i), FPS, [f"one {i}", f"other {i}"]) for i in range(N)]
    return publish(tmp_path_factory.mktemp("clips"), made)


def run(data, *, rank=0, world=1, first=0, last=6, skip=False, frames=T, fps=FPS, workers=0, augment=None):
    order = Order.of(data.count, 5, B, digest=data.digest)
    source = OrderedSource([data], order, rank=rank, world=world, first_step=first, last_step=last, skip_damaged=skip)
    shape = [(8, 12)]
    return list(
        clip_batches(source, frames=frames, fps=fps, shapes=shape, augment=augment or Augment(), workers=workers)
    )


def grays(batch) -> np.ndarray:
    """(B, T): the gray on the darker side of each frame."""
    return np.rint((batch.x_BTCHW.numpy().min(axis=(2, 3, 4)) + 1) * 127.5).astype(int)


def equal(one, other) -> bool:
    return (
        torch.equal(one.x_BTCHW, other.x_BTCHW)
        and (one.captions, one.ids) == (other.captions, other.ids)
        and torch.equal(one.weight_B, other.weight_B)
    )


@pytest.mark.parametrize(("fps", "step"), [(FPS, 1), (None, 1), (FPS / 2, 2)])
def test_windows_begin_where_the_draw_of_their_sample_says(data, fps, step):
    for batch in run(data, fps=fps):
        assert batch.x_BTCHW.shape == (B, T, 3, 8, 12)
        for row, (one, u) in enumerate(zip(batch.ids, starts_of(5, batch.ids), strict=True)):
            number = int(data.key(one.index))
            begin = int(u * (LENGTH - (T - 1) * step))
            assert grays(batch)[row].tolist() == [10 * number + begin + step * t for t in range(T)]
            assert batch.captions[row] in (f"one {number}", f"other {number}")
        assert batch.weight_B.tolist() == [1.0] * B and not batch.damaged


def test_a_clip_begins_elsewhere_in_another_epoch_and_everywhere_in_many(data):
    begins: dict[int, set[int]] = {}
    for batch in run(data, last=40 * N // B):
        for row, one in enumerate(batch.ids):
            begins.setdefault(one.index, set()).add(int(grays(batch)[row, 0]) % 10)
    assert sum(map(len, begins.values())) / N > 7  # of nine


def test_the_start_in_time_is_no_draw_of_rows_or_columns(data):
    from latentray.data.transforms import draws_of

    ids = [one for batch in run(data) for one in batch.ids]
    spatial = {u for draws in draws_of(5, ids) for u in draws.crop}
    assert spatial.isdisjoint(starts_of(5, ids))


def test_all_frames_of_a_clip_are_mirrored_alike_and_half_of_the_clips_are(data):
    mirrored = []
    for batch in run(data, last=30, augment=Augment(flip=True)):
        left = batch.x_BTCHW[:, :, 0, 0, 0] < batch.x_BTCHW[:, :, 0, 0, -1]
        assert (left == left[:, :1]).all()
        mirrored += left[:, 0].tolist()
    assert 0.35 < np.mean(mirrored) < 0.65


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_and_loader_workers_change_nothing(data, world, workers):
    whole = run(data, last=4, augment=Augment(flip=True))
    ranks = [run(data, rank=r, world=world, last=4, workers=workers, augment=Augment(flip=True)) for r in range(world)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.x_BTCHW, torch.cat([part.x_BTCHW for part in parts]))
        assert batch.captions == [text for part in parts for text in part.captions]
        assert batch.ids == [one for part in parts for one in part.ids]


def test_each_clip_once_an_epoch_and_a_resumed_run_goes_on(data):
    whole = run(data)
    assert sorted((one.epoch, one.index) for batch in whole for one in batch.ids) == [
        (epoch, x) for epoch in (0, 1) for x in range(N)
    ]
    assert all(equal(a, b) for a, b in zip(run(data, first=4), whole[4:], strict=True))


def test_clips_that_are_too_short_are_named_before_any_is_read_or_skipped_and_counted(tmp_path):
    made = [clips.clip_sample(f"{i:05d}", numbered(i, 3 if i % 6 == 2 else LENGTH), FPS, ["x"]) for i in range(N)]
    data = publish(tmp_path, made)
    for path in (tmp_path / "set").glob("*.tar"):
        path.rename(path.with_suffix(".away"))
    with pytest.raises(ConfigError, match="3 of 18 clips are too short for 4 frames at 8 per second, '00002'"):
        run(data)
    for path in (tmp_path / "set").glob("*.away"):
        path.rename(path.with_suffix(".tar"))
    found = [one for batch in run(data, skip=True, last=3) for one in batch.damaged]
    assert sorted((one.key, one.reason) for one in found) == [(f"{i:05d}", "too_short") for i in (2, 8, 14)]
    with pytest.raises(DataError, match="too few for 4"):
        list(_without_index_check(data))


def _without_index_check(data):
    """A data set whose index says nothing of lengths."""
    order = Order.of(data.count, 5, B)
    source = OrderedSource([data], order, last_step=3)
    hidden = data.index.table.drop_columns(["frames"])
    data.index.table = hidden
    return clip_batches(source, frames=T, fps=FPS, shapes=[(8, 12)], augment=Augment())


@pytest.mark.parametrize("fps", [None, 3.0, FPS, 24.0])
@pytest.mark.parametrize("frames", [1, 2, 5, 12, 13, 40])
def test_the_index_knows_of_each_clip_what_reading_it_finds(tmp_path, fps, frames):
    lengths = np.array([1, 2, 5, 11, 12, 13, 39])
    rates = np.array([8.0, 8.0, 3.0, 24.0, 8.0, 5.0, 24.0])
    told = clips.too_short(lengths, rates, frames=frames, fps=fps)
    for length, rate, short in zip(lengths.tolist(), rates.tolist(), told.tolist(), strict=True):
        try:
            clips.window(np.arange(length) / rate, frames=frames, fps=rate if fps is None else fps)
        except SampleRejected:
            assert short
        else:
            assert not short


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_clip_ends_the_run_or_keeps_its_place(tmp_path, workers):
    made = [clips.clip_sample(f"{i:05d}", numbered(i), FPS, ["x"], form="mp4") for i in range(N)]
    whole = publish(tmp_path / "whole", made)
    data = publish(tmp_path / "bad", made)
    lost = 7
    entry, offset, _ = data.locate(lost)
    path = tmp_path / "bad" / "set" / entry.name
    content = bytearray(path.read_bytes())
    content[offset + 700] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestMismatch) as caught:
        run(data, last=3, workers=workers)
    assert caught.value.where.endswith(entry.name) and f"'{data.key(lost)}'" in caught.value.what
    found = []
    for batch, undisturbed in zip(run(data, last=3, skip=True, workers=workers), run(whole, last=3), strict=True):
        bad = [one.index == lost for one in batch.ids]
        assert batch.ids == undisturbed.ids
        assert batch.weight_B.tolist() == [0.0 if one else 1.0 for one in bad]
        kept = ~torch.tensor(bad)
        assert torch.equal(batch.x_BTCHW[kept], undisturbed.x_BTCHW[kept])
        assert torch.isfinite(batch.x_BTCHW).all()
        found += batch.damaged
    assert [(one.key, one.reason) for one in found] == [(data.key(lost), "digest")]


def test_pictures_are_no_clips(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(numbered(0)[0]).save(buffer, "PNG")
    made = [shards.Sample(key=f"{i:05d}", members={"png": buffer.getvalue(), "json": b"{}"}) for i in range(N)]
    data = publish(tmp_path, made)
    require_long_enough(data, frames=T, fps=FPS)
    with pytest.raises(DataError, match="no clip"):
        run(data)
