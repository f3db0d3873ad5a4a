"""Where latents come from: stores in buckets, mixtures of them, and pictures encoded online, checked before a worker starts."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch

from latentray.config import compose
from latentray.config.train import Train
from latentray.data.picture_batches import picture_batches
from latentray.data.transforms import Augment
from latentray.errors import ConfigError, FingerprintMismatch, InputMissing
from latentray.training import inputs as checks
from latentray.training import latent_supply
from latentray.training.feed import Feed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tiny, inputs, tmp_path_factory) -> dict[str, str]:
    """`data` of several shapes, and its latents: `squares` and `buckets`."""
    path = Path(tiny.__file__).with_name("several_shapes.py")
    spec = importlib.util.spec_from_file_location("shapes_for_latent_supply", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_all(tmp_path_factory.mktemp("shapes"), tiny, inputs)


@pytest.fixture
def load(tiny):
    def load(*overrides: str) -> Train:
        return compose.load("train", Train, [*tiny.STAGE2, *overrides])

    return load


@pytest.fixture
def online(inputs) -> list[str]:
    """Settings that give what `tiny.write_latents` stores."""
    return [
        "online.enabled=true", f"autoencoder_from={inputs['autoencoder']}", "online.batch_size=16",
        f"online.text_encoder={inputs['text_encoder']}", "online.text_dtype=float32",
    ]  # fmt: skip


IN_BUCKETS = ["buckets.sizes=[32,64]", "buckets.step=16"]


def refused(config: Train, world: int = 1) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        checks.check(config, world)
    return caught.value


# ---- stores in buckets


def test_the_shapes_are_the_stores_and_the_largest_has_the_usual_batch(load, shapes):
    opened = Feed.open(load(f"latents={shapes['buckets']}", "buckets.multiple=3", "global_batch_size=12"))
    assert opened.shapes == ((32, 32), (48, 80), (64, 64), (80, 48))
    assert opened.order.batches == (48, 12, 12, 12)
    assert opened.order.sets[0].counts == (18, 18, 18, 18)
    squares = Feed.open(load(f"latents={shapes['squares']}"))
    assert (squares.shapes, squares.buckets, squares.order.batches) == (((64, 64),), (), (8,))


def test_the_sequence_of_batches_is_the_same_on_any_number_of_ranks_and_after_a_stop(load, shapes):
    config = load(f"latents={shapes['buckets']}", "buckets.multiple=6", "global_batch_size=12")
    order = Feed.open(config).order
    steps = order.steps_in(3)
    whole = [order.step(t) for t in range(steps)]
    assert len({one.bucket for one in whole}) == 4
    for world in (1, 2, 3):
        for stop in (0, 4):
            opened = Feed.open(config)
            resumed = opened.resumed(opened.order.cursor(stop)).order
            for t in range(stop, steps):
                parts = [resumed.part(t, rank, world) for rank in range(world)]
                assert {len(part.ids) for part in parts} == {order.batch_size(t) // world}
                assert [one for part in parts for one in part.ids] == whole[t].ids
    assert sum(len(one.ids) for one in whole) == order.samples_before(steps)


def test_a_mixture_reads_the_union_of_its_stores_shapes(load, shapes, inputs):
    stores = [inputs["latents"], shapes["buckets"]]
    opened = Feed.open(load(f"mixture.of=[{{uri:{stores[0]}}},{{uri:{stores[1]}}}]", "buckets.multiple=2"))
    assert opened.shapes == ((32, 32), (48, 80), (64, 64), (80, 48))
    assert [one.counts for one in opened.order.sets] == [(0, 0, 64, 0), (18, 18, 18, 18)]
    from_both = next(step.ids for step in map(opened.order.step, itertools.count()) if step.bucket == 2)
    assert {one.dataset for one in from_both} == {0, 1}


@pytest.mark.parametrize(
    ("overrides", "world", "where", "told"),
    [
        (["buckets.multiple=3", "global_batch_size=12"], 2, "buckets.multiple", "multiple of 2"),
        (["buckets.multiple=2", "micro_batch_size=2"], 2, "buckets.multiple", "multiple of 4"),
        (["buckets.multiple=24"], 1, "buckets.multiple", "global_batch_size"),
        (["buckets.multiple=2", "order.streams=2"], 1, "order.streams", "null"),
        (
            ["buckets.multiple=2", "denoiser.channels=[16,16,16]", "denoiser.depth=[0,0,1]"],
            1,
            "denoiser.channels",
            "multiples of 32",
        ),
    ],
)
def test_buckets_that_cannot_be_trained_on_are_refused(load, shapes, overrides, world, where, told):
    error = refused(load(f"latents={shapes['buckets']}", *overrides), world)
    assert error.where == where
    assert told in error.mend


def test_a_denoiser_that_cannot_halve_a_shape_is_told_the_numbers(load, shapes):
    deep = ["buckets.multiple=2", "denoiser.channels=[16,16,16]", "denoiser.depth=[0,0,1]"]
    assert "Latents of 10x6, of pictures of 80x48," in refused(load(f"latents={shapes['buckets']}", *deep)).what
    checks.check(load(f"latents={shapes['squares']}", *deep), 1)  # 8x8 divides by 4


def test_good_buckets_pass(load, shapes, inputs):
    found = checks.check(load(f"latents={shapes['buckets']}", "buckets.multiple=2"), 2)
    assert found.keys() == {"latents", "autoencoder"}


def test_stage_2_refuses_what_contradicts_its_source(load, online):
    for overrides, where in ((["buckets.sizes=[64]"], "buckets.sizes"), ([*online, "latents=l"], "latents")):
        with pytest.raises(ConfigError) as caught:
            load(*overrides)
        assert caught.value.where == where


# ---- online


def both(load, online, stored: str, data: str, *overrides: str):
    """A batch of each step from the store, and from the pictures."""
    found = []
    for config in (
        load(f"latents={stored}", "buckets.multiple=2"),
        load(f"data={data}", *online, "buckets.multiple=2", *overrides),
    ):
        source = latent_supply.open_source(config, CPU)
        steps = source.feed.order.steps_in(1.5)
        read = source.batches(source.feed.source(rank=0, world=1, first_step=0, last_step=steps))
        found.append([source.latents(batch) for batch in read])
    return zip(*found, strict=True)


@pytest.mark.parametrize("kind", ["squares", "buckets"])
def test_online_latents_are_the_stored_ones_bit_for_bit(load, online, shapes, kind):
    torch.set_num_threads(1)  # as the job encodes
    for stored, made in both(load, online, shapes[kind], shapes["data"], *(IN_BUCKETS if kind == "buckets" else [])):
        assert made.ids == stored.ids
        for name in ("mean_BChw", "logvar_BChw", "weight_B"):
            assert torch.equal(getattr(made, name), getattr(stored, name)), name
        assert torch.equal(made.given.size_B6, stored.given.size_B6)
        for name in ("tokens_BLD", "mask_BL", "pooled_BD"):  # of one of two captions, drawn
            assert torch.equal(getattr(made.given.texts[0], name), getattr(stored.given.texts[0], name)), name


def test_both_sources_say_the_same_of_their_encoders(load, online, inputs):
    stored = latent_supply.open_source(load(f"latents={inputs['latents']}"), CPU).space
    made = latent_supply.open_source(load(f"data={inputs['data']}", *online), CPU).space
    assert made.facts == stored.facts
    assert (made.scale, made.size, made.texts) == (stored.scale, stored.size, stored.texts)
    assert made.autoencoder_uri == stored.autoencoder_uri
    assert torch.equal(made.empty.texts[0].tokens_BLD, stored.empty.texts[0].tokens_BLD)


def test_crops_and_mirroring_are_drawn_as_in_stage_1(load, online, shapes):
    varied = ["online.crop=random", "online.flip=true"]
    source = latent_supply.open_source(load(f"data={shapes['data']}", *online, *varied), CPU)
    opened = source.feed.source(rank=0, world=1, first_step=0, last_step=9)
    as_stage_1 = picture_batches(opened, shapes=[(64, 64)], augment=Augment(crop="random", flip=True))
    still = picture_batches(opened, shapes=[(64, 64)], augment=Augment())
    moved = 0
    for ours, theirs, unmoved in zip(source.batches(opened), as_stage_1, still, strict=True):
        assert torch.equal(ours.x_BCHW, theirs.x_BCHW)
        moved += not torch.equal(ours.x_BCHW, unmoved.x_BCHW)
    assert moved == 9


def test_nothing_of_the_encoders_is_trained(load, online, inputs):
    source = latent_supply.open_source(load(f"data={inputs['data']}", *online), CPU)
    assert isinstance(source, latent_supply.OnlineLatents)
    for net in (source.autoencoder, source.embedders[0].encoder.model):
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())
    read = source.batches(source.feed.source(rank=0, world=1, first_step=0, last_step=1))
    made = source.latents(next(iter(read)))
    assert not made.mean_BChw.requires_grad and not made.mean_BChw.is_inference()


def test_a_run_does_not_go_on_with_other_encoders(load, online, inputs, tiny, tmp_path):
    config = load(f"data={inputs['data']}", *online)
    cursor = latent_supply.open_source(config, CPU).feed.order.cursor(3)
    other = tiny.write_autoencoder(str(tmp_path / "other"), seed=5)
    changed = load(f"data={inputs['data']}", *online, f"autoencoder_from={other}")
    with pytest.raises(FingerprintMismatch):
        latent_supply.open_source(changed, CPU).feed.resumed(cursor)
    latent_supply.open_source(config, CPU).feed.resumed(cursor)


def test_online_settings_are_checked_before_a_worker_starts(load, online, inputs, shapes):
    data = f"data={inputs['data']}"
    assert checks.check(load(data, *online), 1).keys() == {"dataset", "autoencoder", "text_encoder"}
    assert refused(load(*online)).where == "data"
    assert refused(load(data, *online, "autoencoder_from=null")).where == "autoencoder_from"
    assert refused(load(data, *online, "size=60")).where == "size"
    assert (
        refused(
            load(f"data={shapes['data']}", *online, "buckets.sizes=[60]", "buckets.step=12", "buckets.multiple=2")
        ).where
        == "buckets.step"
    )
    assert refused(load(data, *online, "denoiser.context_width=7")).mend == "Set denoiser.context_width=16."
    assert refused(load(data, *online, "denoiser.in_channels=3")).where == "denoiser.in_channels"
    assert "online.enabled" in refused(load()).mend
    with pytest.raises(InputMissing):
        checks.check(load(data, *online, "online.text_encoder=./nowhere"), 1)
