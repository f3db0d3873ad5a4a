"""From settings to what a run reads: one data set, a mixture, buckets; and what the ledger counts."""

import pytest
import torch
import torch.distributed as dist

from latentray.config import compose
from latentray.config.train import Train
from latentray.data.buckets import Bucketed
from latentray.errors import ConfigError, DataError, FingerprintMismatch
from latentray.records import Damaged, PictureBatch, Traffic
from latentray.training import latent_supply, stage2
from latentray.training.feed import Feed, Ledger
from latentray.training.state import Worker


@pytest.fixture
def load(tiny, inputs):
    def load(*overrides: str, data: str | None = inputs["data"]) -> Train:
        return compose.load("train", Train, [*tiny.STAGE1, *([f"data={data}"] if data else []), *overrides])

    return load


def test_one_data_set(load):
    config = load("order.chunk=4", "order.drop_remainder=true", "global_batch_size=24", "total_samples=240")
    opened = Feed.open(config)
    assert (opened.samples, opened.order.batches, opened.buckets, opened.shapes) == (64, (24,), (), ((64, 64),))
    assert (opened.order.reading.chunk, opened.order.dropped_per_epoch) == (4, 64 % 24)
    assert opened.inputs == {"dataset": opened.sets[0].manifest.digest}
    assert Feed.open(load()).order.reading.chunk == 1  # local: a full shuffle


def test_a_mixture_by_samples_and_by_epochs(load, inputs, tiny, tmp_path):
    tiny.write_pictures(tmp_path, "train", 12)
    of = f"mixture.of=[{{uri:{inputs['data']},weight:1}},{{uri:{tmp_path}/data,weight:1}}]"
    by_samples, by_epochs = (Feed.open(load(of, f"mixture.by={by}", data=None)) for by in ("samples", "epochs"))
    assert by_samples.samples == 64 + 12
    assert by_samples.order.segments[0].weights == (0.5, 0.5)
    assert by_epochs.order.segments[0].weights == pytest.approx((64 / 76, 12 / 76))
    assert set(by_samples.inputs) == {"dataset.0", "dataset.1"}
    resumed = by_epochs.resumed(by_samples.order.cursor(5))
    assert [one.first_step for one in resumed.order.segments] == [0, 5]
    with pytest.raises(FingerprintMismatch):
        Feed.open(load()).resumed(by_samples.order.cursor(5))


def test_buckets_follow_the_index(load):
    config = load("buckets.sizes=[32,64]", "buckets.step=16", "buckets.multiple=2", "global_batch_size=16")
    opened = Feed.open(config)
    assert isinstance(opened.order.sets[0], Bucketed)
    assert sum(opened.order.sets[0].counts) == 64
    square = opened.shapes.index((64, 64))  # the pictures are 64 pixels square
    assert opened.order.sets[0].counts[square] == 64
    assert opened.order.batches[square] == 16 * config.size**2 // 64**2


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["mixture.of=[{uri:a}]"], "mixture.of"),
        (["order.streams=5"], "order.streams"),
        (["damage.policy=ignore"], "damage.policy"),
        (["buckets.sizes=[64]", "buckets.step=12"], "buckets.step"),
        (["buckets.sizes=[64]", "buckets.multiple=3", "cluster.workers=2", "cluster.kind=ray"], "buckets.multiple"),
        (
            [
                "buckets.sizes=[64]",
                "buckets.multiple=2",
                "global_batch_size=8",
                "micro_batch_size=2",
                "cluster.kind=ray",
            ],
            "buckets.multiple",
        ),
        (["crop=left"], "crop"),
        (["order.chunk=0"], "order.chunk"),
        (["fetch.cache_bytes=5"], "fetch.cache_bytes"),
        (["online.enabled=true"], "online.enabled"),
        (["online.batch_size=0"], "online.batch_size"),
        (["online.latent_dtype=float8"], "online.latent_dtype"),
        (["online.precision=fp16"], "online.precision"),
        (["online.text_dtype=int8"], "online.text_dtype"),
        (["online.crop=left"], "online.crop"),
    ],
)
def test_bad_settings_are_refused_by_name(load, overrides, where):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert caught.value.where == where


def test_stage_2_reads_the_first_of_several_text_encoders(tiny, inputs, monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(latent_supply, "latent_batches", lambda source, **settings: asked.update(settings) or iter(()))
    monkeypatch.setattr(stage2, "Engine", lambda *args, **settings: None)
    config = compose.load("train", Train, [*tiny.STAGE2, f"latents={inputs['latents']}"])
    worker = Worker(config=config, run="r", out="o", rank=0, world=1, device=torch.device("cpu"), attempt="a")
    stage = stage2.DiffusionStage(worker)
    list(stage.batches(0, 1))
    assert asked["encoders"] == [one.name for one in stage.space.texts] == ["clip"]


def test_the_ledger_counts_and_stops(load, tmp_path, capsys):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ledger = Ledger(Feed.open(load()), allowed=0.04, device=torch.device("cpu"), damaged_before=1)
        damaged = Damaged(reason="digest", shard="00003.tar", key="000000007", what="it was cut")
        batch = PictureBatch(
            x_BCHW=torch.zeros(1, 3, 8, 8),
            size_B6=torch.zeros(1, 6),
            captions=[""],
            ids=[],
            weight_B=torch.zeros(1),
            damaged=[damaged],
            traffic=Traffic(fetched_bytes=10, retries=2),
        )
        ledger.note(batch)
        assert "000000007 in 00003.tar (digest): it was cut" in capsys.readouterr().out
        figures = ledger.figures(8)
        assert (figures["data/damaged_samples"], figures["data/fetched_bytes"], figures["data/fetch_retries"]) == (
            2,
            10,
            2,
        )
        ledger.note(batch)
        with pytest.raises(DataError, match="3 of 64"):
            ledger.damaged(64)
        assert ledger.damaged(640) == 3, "each epoch meets the same damaged samples again"
    finally:
        dist.destroy_process_group()
