"""What a policy learns from: windows as what is noised and what is told; and what is refused before a worker starts."""

import numpy as np
import pytest
import torch

from latentray.checkpoint import manifest
from latentray.conditioning.observations import Range
from latentray.config import compose
from latentray.config.train import Train
from latentray.data import episodes, index, shards, synthetic_episodes
from latentray.errors import ConfigError, DataError
from latentray.training import inputs as checks
from latentray.training import latent_supply
from latentray.training.episode_supply import Episodes

CPU = torch.device("cpu")
POLICY = [
    "denoiser=policy_tiny", "denoiser.channels=[8,8]", "objective=flow", "stage.sampler=flow_euler", "precision=fp32",
    "global_batch_size=8", "total_samples=64", "cluster=none", "tracking=none",
]  # fmt: skip


def publish(root, made, split="train"):
    folder = root / f"built-{split}"
    folder.mkdir(parents=True)
    index.write([shards.write_shard(made, folder / shards.shard_name(0))], folder / index.NAME)
    manifest.publish(folder, root / "data" / split, kind="dataset")
    return str(root / "data")


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> str:
    return publish(tmp_path_factory.mktemp("gate"), list(synthetic_episodes.episodes(12, 3)))


@pytest.fixture(scope="module")
def robot(tmp_path_factory) -> str:
    """Episodes with two vectors, a picture and a number."""
    made = []
    for number in range(3):
        t = number + np.arange(20, dtype=np.float32)[:, None]
        obs = {
            "joints": np.repeat(t, 3, axis=1),
            "arm": np.repeat(10 * t, 2, axis=1),
            "camera": np.zeros((20, 4, 4, 3), np.uint8),
            "clock": t[:, 0],
        }
        made.append(episodes.episode_sample(f"{number:03d}", np.repeat(t, 2, axis=1), obs))
    return publish(tmp_path_factory.mktemp("robot"), made)


def load(*overrides: str) -> Train:
    return compose.load("train", Train, [*POLICY, *overrides])


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        checks.check(load(*overrides), 1)
    return caught.value


def test_its_batches_are_normalised_windows_and_the_loss_counts_no_made_up_action(gate):
    source = latent_supply.open_source(load(f"data={gate}"), CPU)
    assert isinstance(source, Episodes)
    ended = 0
    for read in source.batches(source.feed.source(rank=0, world=1, first_step=0, last_step=6)):
        batch = source.latents(read)
        assert batch.mean_BChw.shape == (8, 16, 2) and batch.logvar_BChw is None
        assert batch.given.observations_BTD.shape == (8, 2, 7) and not batch.given.texts
        for values in (batch.mean_BChw, batch.given.observations_BTD):
            assert values.dtype == torch.float32 and values.abs().max() <= 1 + 1e-6
        assert torch.equal(batch.counts_B[..., 0], read.action_mask_BT)
        ended += int((~read.action_mask_BT).sum())
    assert ended > 0, "no window reached beyond an end"
    actions = source.space.ranges["actions"]
    assert actions.high[0] <= 1 and actions.low[1] < 0 < actions.high[1]


def test_a_sample_is_a_window_and_its_order_does_not_depend_on_the_ranks(gate):
    feed = latent_supply.open_source(load(f"data={gate}"), CPU).feed
    assert feed.samples == sum(one.count for one in feed.windows) > 12
    whole = [x.ids for x in _batches(gate, 0, 1)]
    halves = [[*a.ids, *b.ids] for a, b in zip(_batches(gate, 0, 2), _batches(gate, 1, 2), strict=True)]
    assert whole == halves


def _batches(data: str, rank: int, world: int):
    source = latent_supply.open_source(load(f"data={data}"), CPU)
    return list(source.batches(source.feed.source(rank=rank, world=world, first_step=2, last_step=5)))


def test_vectors_stand_side_by_side_in_the_order_they_are_named(robot):
    base = [f"data={robot}", "denoiser.observation_width=5"]
    for names, first, second in (("joints,arm", 3, 2), ("arm,joints", 2, 3)):
        source = latent_supply.open_source(load(*base, f"policy.observations=[{names}]"), CPU)
        assert source.space.observations == tuple(names.split(","))
        (read,) = source.batches(source.feed.source(rank=0, world=1, first_step=0, last_step=1))
        seen = source.latents(read).given.observations_BTD
        one, other = names.split(",")
        assert torch.equal(seen[..., :first], read.observations[one])
        assert torch.equal(seen[..., first:], read.observations[other]) and seen.shape[-1] == first + second


def test_what_fits_passes_and_tells_its_inputs(gate):
    config = load(f"data={gate}")
    assert checks.check(config, 2) == {"dataset": manifest.read(f"{gate}/train").digest}


def test_the_ranges_are_facts_of_the_run(gate):
    space = latent_supply.open_source(load(f"data={gate}"), CPU).space
    changed = {**space.ranges, "actions": Range(low=space.ranges["actions"].low - 1, high=space.ranges["actions"].high)}
    assert space.facts["observations"] == ["state"]
    assert type(space)(observations=space.observations, ranges=changed).facts != space.facts


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ([], "data"),
        (["data={gate}", "denoiser.in_channels=3", "denoiser.out_channels=3"], "denoiser.in_channels"),
        (["data={gate}", "denoiser.observation_width=6"], "denoiser.observation_width"),
        (["data={gate}", "policy.observations=[stat]"], "policy.observations"),
        (["data={robot}"], "policy.observations"),
        (["data={robot}", "policy.observations=[camera]"], "policy.observations"),
        (["data={robot}", "policy.observations=[clock]"], "policy.observations"),
        (["data={gate}", "stage.sampler=ddim"], "sampler"),
    ],
)
def test_what_does_not_fit_the_episodes_is_refused_by_name(gate, robot, settings, where):
    error = refused(*(one.format(gate=gate, robot=robot) for one in settings))
    assert error.where == where
    assert error.mend


def test_a_picture_among_the_observations_is_refused_with_the_vectors_to_name(robot):
    assert "joints" in refused(f"data={robot}").mend and "arm" in refused(f"data={robot}").mend


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("latents=somewhere", "latents"),
        ("online.enabled=true", "online.enabled"),
        ("objective.offset_noise=0.1", "objective.offset_noise"),
        ("policy.executed=17", "policy.executed"),
        ("policy.executed=0", "policy.executed"),
        ("policy.observations=[a,a]", "policy.observations"),
        ("buckets.sizes=[64]", "buckets.sizes"),
    ],
)
def test_settings_that_contradict_a_policy_are_refused_before_anything_is_opened(override, where):
    with pytest.raises(ConfigError) as caught:
        load("data=d", override)
    assert caught.value.where == where


def test_pictures_are_no_episodes(inputs):
    with pytest.raises(DataError, match="no column `steps`"):
        checks.check(load(f"data={inputs['data']}"), 1)
