"""Plans: complete, warning of what will not work, and comparable with what a run took."""

import dataclasses
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from latentray.config import compose
from latentray.config.plan import PlanConfig
from latentray.errors import ConfigError
from latentray.planning import plan_report
from latentray.planning.plan import beside, of_workload, plan, workloads


@pytest.fixture(scope="module")
def taken(tiny):
    """What a step of the small configuration takes, with and without checkpointed activations."""
    return workloads(tiny("gpu=h100", "precision=bf16"))


@pytest.fixture(scope="module")
def small(tiny, taken):
    return of_workload(tiny("gpu=h100", "gpus=4", "precision=bf16", "deepspeed=zero2", "measured=100"), *taken)


def load(*overrides: str) -> PlanConfig:
    return compose.load("plan", PlanConfig, ["tracking=none", *overrides])


def test_a_plan_holds_together(small):
    assert [one.stage for one in small.stages] == [0, 1, 2, 3]
    assert small.own_stage.stage == 2
    assert small.micro_batch * small.accumulation * small.gpus == 24
    for one in (small.assumed, small.measured):
        assert one.hours * 3600 * one.samples_per_second == pytest.approx(4800)
        assert one.cost == pytest.approx(one.hours * 4 * 2.5)
    assert small.assumed.utilisation == pytest.approx(0.3)
    assert small.measured.samples_per_second == 100
    trained = sum(net.parameters for net in small.networks)
    assert small.checkpoints.bytes == 16 * trained
    assert small.checkpoints.result_bytes == 4 * trained
    for one in small.stages:
        assert one.fits and one.largest_micro_batch >= small.micro_batch
        assert one.largest_checkpointed >= one.largest_micro_batch


def test_its_json_is_whole(small):
    told = json.loads(json.dumps(small.to_json()))
    assert told["stages"][2]["memory"]["total"] == small.own_stage.memory.total
    assert {field.name for field in dataclasses.fields(small)} == set(told)


def test_what_does_not_fit_is_told_with_what_would(tiny, taken):
    config = tiny("gpu=rtx4090", "global_batch_size=32768", "total_samples=327680")
    made = of_workload(config, *taken)
    assert not made.own_stage.fits
    (told,) = [one for one in made.warnings if "does not fit" in one]
    micro = int(told.rsplit("micro_batch_size=", 1)[1].rstrip("."))
    assert 32768 % micro == 0 and micro <= made.own_stage.largest_micro_batch
    mended = of_workload(dataclasses.replace(config, micro_batch_size=micro), *taken)
    assert mended.own_stage.fits
    assert mended.micro_batch == micro


def test_checkpoints_that_are_too_rare_are_told_with_how_often(tiny, taken):
    rare = tiny(
        "gpu=h100",
        "measured=1",
        "total_samples=480000",
        "gpu_hours_between_failures=10",
        "checkpoint_every_samples=240000",
    )
    made = of_workload(rare, *taken)
    (told,) = [one for one in made.warnings if "checkpoint_every_samples" in one]
    every = int(told.rsplit("=", 1)[1].rstrip("."))
    mended = of_workload(dataclasses.replace(rare, checkpoint_every_samples=every), *taken)
    assert not [one for one in mended.warnings if "A checkpoint" in one]
    assert mended.checkpoints.lost_share < made.checkpoints.lost_share
    often = of_workload(dataclasses.replace(rare, checkpoint_every_samples=24, storage_gb_per_s=1e-4), *taken)
    assert any("raise checkpoint_every_samples" in one for one in often.warnings)


def test_a_throughput_beyond_the_peak_is_doubted(tiny, taken):
    made = of_workload(tiny("gpu=h100", "measured=1e12"), *taken)
    assert any("peak" in one for one in made.warnings)


def test_a_plan_stands_beside_what_a_run_took(small):
    actual = {"samples_per_second": 80.0, "peak_memory_bytes": 1e9, "something/else": 3.0}
    rows = beside(small, actual)
    assert [(row.name, row.actual) for row in rows] == [("samples_per_second", 80.0), ("peak_memory_bytes", 1e9)]
    assert rows[0].ratio == pytest.approx(0.8)
    assert rows[1].planned == small.own_stage.memory.total
    assert beside(json.loads(json.dumps(small.to_json())), actual) == rows


def test_the_tables_say_what_counts(small):
    out = io.StringIO()
    plan_report.show(small, Console(file=out, width=200))
    told = out.getvalue()
    for part in ("ZeRO 2 *", "largest micro-batch", "with checkpointed activations", "assumed", "measured", "100.0"):
        assert part in told


def test_plan_and_picture_are_written_where_out_says(small, tmp_path):
    plan_report.write(small, str(tmp_path / "new"))
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["gpus"] == 4
    with Image.open(tmp_path / "new" / "plan.png") as picture:
        assert picture.format == "PNG" and picture.width > 400
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 6  # bars, not an empty frame


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["gpu=tpu"], "gpu"),
        (["mfu=0"], "mfu"),
        (["mfu=1.5"], "mfu"),
        (["gpus=0"], "gpus"),
        (["gpus=7", "global_batch_size=96"], "global_batch_size"),
        (["headroom=1"], "headroom"),
        (["price_per_gpu_hour=-1"], "price_per_gpu_hour"),
        (["storage_gb_per_s=0"], "storage_gb_per_s"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides, where):
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert caught.value.where == where


def test_it_takes_every_setting_of_training():
    assert load("experiment=shapes_autoencoder", "gpu=cpu").workers == 2  # cluster.workers
    assert load("stage=autoencoder", "size=128", "optimizer.lr=0.5").optimizer.lr == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [
        ("kl_f8", 83_653_863),
        ("sd15_256", 859_520_964),
        ("sd15_512", 859_520_964),
        ("sdxl_256", 2_567_463_684),
        ("sdxl_512", 2_567_463_684),
        ("sdxl_1024", 2_567_463_684),
        ("sd3_medium_1024", 2_028_328_000),
    ],
)
def test_the_experiments_at_real_size_fit_on_80_gb(experiment, parameters):
    made = plan(load(f"experiment={experiment}", "gpu=h100"))
    assert made.networks[0].parameters == parameters
    assert made.own_stage.fits
    assert not made.warnings


def test_pictures_that_the_autoencoder_does_not_divide_are_refused(tiny):
    with pytest.raises(ConfigError) as caught:
        load("size=100")
    assert caught.value.where == "size" and "multiple of 8" in caught.value.mend
    with pytest.raises(ConfigError, match="Latents of 13x13") as caught:  # as a run would refuse it
        load("size=104")
    assert "multiples of 64" in caught.value.mend
    assert load("size=128").size == 128
    in_buckets = load("size=100", "online.enabled=true", "buckets.sizes=[512]")  # its pictures are multiples of a step
    assert in_buckets.buckets.sizes == [512]


def test_a_run_without_checkpoints_is_told_so(tiny, taken):
    def told(every: int) -> str:
        out = io.StringIO()
        made = of_workload(tiny("gpu=h100", f"checkpoint_every_samples={every}"), *taken)
        plan_report.show(made, Console(file=out, width=400))
        return out.getvalue()

    assert "None is written (checkpoint_every_samples=0)" in told(0) and "One each" not in told(0)
    assert "One each" in told(240) and "None is written" not in told(240)
