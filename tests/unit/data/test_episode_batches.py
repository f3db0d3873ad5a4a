"""Windows of episodes in the order of training: exactly once, whatever reads them; a damaged episode loses its windows only."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentray.checkpoint import manifest
from latentray.data import episodes, index, shards
from latentray.data.episode_batches import EpisodeWindows, episode_batches
from latentray.data.episodes import Horizon
from latentray.data.ordering import Order
from latentray.data.pipeline import OrderedSource
from latentray.errors import DataError, DigestMismatch

B = 6
STEPS = [5, 1, 9, 3, 7, 12, 2, 4]
HORIZON = Horizon(observations=2, actions=3)


def sample(number: int, steps: int, *, width: int = 2) -> shards.Sample:
    """Step t of episode e is seen as 100 e + t, and done as (100 e + t, ...)."""
    t = 100.0 * number + np.arange(steps, dtype=np.float32)
    obs = {
        "state": np.stack([t, -t, t * 0 + 5], axis=1).astype(np.float32),
        "picture": np.broadcast_to((t % 100).astype(np.uint8)[:, None, None, None], (steps, 4, 5, 3)),
    }
    return episodes.episode_sample(f"{number:05d}", np.repeat(t[:, None], width, axis=1), obs)


def publish(root, steps=STEPS, made=None):
    folder = root / "built"
    folder.mkdir(parents=True)
    made = made or [sample(i, count) for i, count in enumerate(steps)]
    results = [shards.write_shard(made[i::2], folder / shards.shard_name(i)) for i in range(2)]
    index.write(results, folder / index.NAME)
    manifest.publish(folder, root / "set", kind="dataset")
    return shards.IndexedShards.open(root / "set")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("episodes"))


def source_of(windows, *, rank=0, world=1, first=0, last=6, skip=False):
    order = Order((windows.samples,), 5, (B,))
    return OrderedSource([windows], order, rank=rank, world=world, first_step=first, last_step=last, skip_damaged=skip)


def run(data, *, horizon=HORIZON, workers=0, ranges=None, held_bytes=1 << 20, **options):
    windows = EpisodeWindows(data, horizon, held_bytes=held_bytes)
    return list(episode_batches(source_of(windows, **options), ranges=ranges, workers=workers))


def equal(one, other) -> bool:
    return (
        one.ids == other.ids
        and torch.equal(one.actions_BTA, other.actions_BTA)
        and torch.equal(one.action_mask_BT, other.action_mask_BT)
        and torch.equal(one.observation_mask_BT, other.observation_mask_BT)
        and all(torch.equal(one.observations[name], other.observations[name]) for name in other.observations)
        and torch.equal(one.weight_B, other.weight_B)
    )


def test_a_batch_holds_the_windows_that_the_order_says(data):
    windows = EpisodeWindows(data, HORIZON)
    assert windows.count == sum(STEPS)
    for batch in run(data):
        assert batch.actions_BTA.shape == (B, 3, 2) and batch.actions_BTA.dtype == torch.float32
        assert batch.observations["state"].shape == (B, 2, 3)
        assert batch.observations["picture"].shape == (B, 2, 3, 4, 5)
        for row, one in enumerate(batch.ids):
            (x,), (t,) = windows.windows.locate([one.index])
            number = int(data.key(int(x)))
            last = STEPS[number] - 1
            seen, ahead = [t - 1, t], [t, t + 1, t + 2]
            assert batch.observation_mask_BT[row].tolist() == [s >= 0 for s in seen]
            assert batch.action_mask_BT[row].tolist() == [s <= last for s in ahead]
            assert batch.observations["state"][row, :, 0].tolist() == [100 * number + max(s, 0) for s in seen]
            assert batch.actions_BTA[row, :, 1].tolist() == [100 * number + min(s, last) for s in ahead]
            grays = (batch.observations["picture"][row, :, 0, 0, 0] + 1) * 127.5
            assert grays.round().tolist() == [max(s, 0) for s in seen]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    observations=st.integers(1, 4),
    actions=st.integers(1, 5),
    padded=st.booleans(),
    epochs=st.integers(1, 3),
    world=st.sampled_from([1, 2, 3]),
)
def test_every_window_once_an_epoch_at_any_horizon_and_world(data, observations, actions, padded, epochs, world):
    pads = {} if padded else {"pad_before": 0, "pad_after": 0}
    horizon = Horizon(observations=observations, actions=actions, **pads)
    n = EpisodeWindows(data, horizon).count
    order = Order.of(n, 5, B)
    steps = epochs * n // B
    found = [
        one
        for rank in range(world)
        for batch in run(data, horizon=horizon, rank=rank, world=world, last=steps)
        for one in batch.ids
    ]
    wanted = [one for t in range(steps) for one in order.step(t).ids]
    key = lambda one: (one.epoch, one.index)  # noqa: E731
    assert sorted(found, key=key) == sorted(wanted, key=key)
    assert len(set(map(key, found))) == steps * B
    whole = [key(one) for one in found if one.epoch < steps * B // n]
    assert sorted(whole) == [(epoch, x) for epoch in range(steps * B // n) for x in range(n)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_and_loader_workers_change_nothing(data, world, workers):
    whole = run(data, last=3)
    ranks = [run(data, rank=r, world=world, workers=workers, last=3) for r in range(world)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.actions_BTA, torch.cat([part.actions_BTA for part in parts]))
        for name, values in batch.observations.items():
            assert torch.equal(values, torch.cat([part.observations[name] for part in parts]))
        assert batch.ids == [one for part in parts for one in part.ids]


def test_a_resumed_run_goes_on_and_another_horizon_is_another_order(data):
    whole = run(data, last=8)
    assert all(equal(a, b) for a, b in zip(run(data, first=5, last=8), whole[5:], strict=True))
    digests = {EpisodeWindows(data, Horizon(observations=2, actions=n)).digest for n in (1, 2, 3)}
    assert len(digests) == 3


@pytest.mark.parametrize("held_bytes", [0, 300, 1 << 30])
def test_what_is_held_changes_nothing_and_is_bounded(data, held_bytes):
    windows = EpisodeWindows(data, HORIZON, held_bytes=held_bytes)
    made = list(episode_batches(source_of(windows, last=20)))
    assert all(equal(a, b) for a, b in zip(made, run(data, last=20), strict=True))
    held = sum(
        one.actions_TA.nbytes + sum(values.nbytes for values in one.obs.values()) for one in windows._held.values()
    )
    assert held == windows._bytes
    assert held <= held_bytes or len(windows._held) == 1
    if held_bytes == 1 << 30:
        assert len(windows._held) == len(STEPS)
    assert not pickle.loads(pickle.dumps(windows))._held


def test_ranges_make_it_minus_one_to_one(data):
    read = (episodes.read_episode(_decoded(data, x)) for x in range(data.count))
    ranges = episodes.ranges(read)
    plain, normal = run(data, last=12), run(data, last=12, ranges=ranges)
    for one, other in zip(plain, normal, strict=True):
        assert other.actions_BTA.abs().max() <= 1
        state = other.observations["state"].numpy()
        np.testing.assert_allclose(
            ranges["obs.state"].restored(state), one.observations["state"].numpy(), rtol=1e-5, atol=1e-4
        )
        assert (state[..., 2] == 0).all()  # a constant
        assert torch.equal(one.observations["picture"], other.observations["picture"])
    assert min(batch.actions_BTA.min() for batch in normal) == -1
    with pytest.raises(DataError, match="range of actions"):
        run(data, ranges={"actions": episodes.Range(low=np.zeros(3), high=np.ones(3))})


def _decoded(data, x):
    from latentray.data import members

    return members.decode_sample(data.read(x))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_episode_ends_the_run_or_its_windows_keep_their_places(tmp_path, workers, data):
    bad = publish(tmp_path)
    lost = 5
    entry, offset, _ = bad.locate(lost)
    path = tmp_path / "set" / entry.name
    content = bytearray(path.read_bytes())
    content[offset + 700] ^= 1
    path.write_bytes(content)
    steps = -(-sum(STEPS) // B)
    with pytest.raises(DigestMismatch) as caught:
        run(bad, last=steps, workers=workers)
    assert f"'{bad.key(lost)}'" in caught.value.what
    windows = EpisodeWindows(bad, HORIZON)
    found = 0
    for batch, undisturbed in zip(run(bad, last=steps, skip=True, workers=workers), run(data, last=steps), strict=True):
        assert batch.ids == undisturbed.ids
        hit = [int(windows.windows.locate([one.index])[0][0]) == lost for one in batch.ids]
        assert batch.weight_B.tolist() == [0.0 if one else 1.0 for one in hit]
        kept = ~torch.tensor(hit)
        assert torch.equal(batch.actions_BTA[kept], undisturbed.actions_BTA[kept])
        assert torch.isfinite(batch.actions_BTA).all()
        assert all(one.key == bad.key(lost) and one.shard.endswith(entry.name) for one in batch.damaged)
        found += sum(
            one.index < windows.count and one.epoch == 0 for one, is_hit in zip(batch.ids, hit, strict=True) if is_hit
        )
    assert found == STEPS[int(bad.key(lost))]


def test_where_the_first_episode_is_lost_another_says_how_windows_look(tmp_path):
    data = publish(tmp_path)
    path = tmp_path / "set" / "00000.tar"
    path.unlink()
    (batch, *_) = run(data, skip=True, last=8)
    assert batch.actions_BTA.shape == (B, 3, 2)
    (tmp_path / "set" / "00001.tar").unlink()
    data.close()
    with pytest.raises(DataError, match="No episode"):
        run(data, skip=True)


def test_an_episode_unlike_the_first_is_named(tmp_path):
    made = [sample(i, count, width=3 if i == 4 else 2) for i, count in enumerate(STEPS)]
    data = publish(tmp_path, made=made)
    with pytest.raises(DataError, match="'00004'"):
        run(data, last=8)
    found = [one for batch in run(data, skip=True, last=7) for one in batch.damaged]
    assert {(one.key, one.reason) for one in found} == {("00004", "layout")}


def test_a_length_that_the_index_does_not_know_is_refused(tmp_path):
    made = [sample(i, count) for i, count in enumerate(STEPS)]
    made[2].columns["steps"] = 8
    data = publish(tmp_path, made=made)
    with pytest.raises(DataError, match="'00002' has 9 steps; the index says 8"):
        run(data, last=8)


def test_pictures_are_no_episodes(tmp_path):
    made = [shards.Sample(key=f"{i:05d}", members={"txt": b"x"}) for i in range(4)]
    with pytest.raises(DataError, match="no column `steps`"):
        EpisodeWindows(publish(tmp_path, made=made), HORIZON)
