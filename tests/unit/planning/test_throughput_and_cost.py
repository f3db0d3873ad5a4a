"""Samples per second, hours, money and the interval of checkpoints: their formulas, inverses and optima."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentray.errors import ConfigError, InputMissing
from latentray.planning import accelerators, cost, throughput
from latentray.tracking import names

H100 = accelerators.ACCELERATORS["h100"]


@given(bf16=st.floats(1e9, 1e14), fp32=st.floats(0, 1e14), gpus=st.integers(1, 4096), share=st.floats(0.01, 1.0))
def test_throughput_and_utilisation_are_inverse(bf16, fp32, gpus, share):
    flops = {"bf16": bf16, "fp32": fp32}
    rate = throughput.samples_per_second(flops, H100, gpus=gpus, utilisation=share)
    assert throughput.utilisation(flops, H100, gpus=gpus, samples_per_second=rate) == pytest.approx(share)
    assert throughput.samples_per_second(flops, H100, gpus=2 * gpus, utilisation=share) == pytest.approx(2 * rate)


def test_at_its_peak_a_device_does_its_peak():
    assert throughput.seconds_at_peak({"bf16": H100.bf16_flops}, H100) == 1.0
    assert throughput.seconds_at_peak({"fp32": H100.fp32_flops, "bf16": H100.bf16_flops}, H100) == 2.0


def test_measured_is_a_number_or_the_median_of_a_run_without_its_warm_up(tmp_path):
    assert throughput.measured("272.5") == 272.5
    rates = [3.0, 100.0, 104.0, 96.0, "nan"]
    lines = [json.dumps({"samples": 10 * i, names.TRAIN_SAMPLES_PER_SECOND: r}) for i, r in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"samples": 60, "tra')
    assert throughput.measured(str(tmp_path / "metrics.jsonl")) == 100.0
    assert throughput.measured(str(tmp_path)) == 100.0


@pytest.mark.parametrize("given", ["0", "-3", "nan"])
def test_a_throughput_that_is_none_is_refused(given):
    with pytest.raises(ConfigError) as caught:
        throughput.measured(given)
    assert caught.value.where == "measured"


def test_a_file_without_throughput_is_refused_by_name(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"samples": 1, "train/loss": 2}\n')
    with pytest.raises(InputMissing, match="samples_per_second"):
        throughput.measured(str(tmp_path))
    with pytest.raises(InputMissing):
        throughput.measured(str(tmp_path / "elsewhere"))


@given(checkpoint=st.floats(0.1, 600), between=st.floats(3600, 1e8))
def test_the_best_interval_loses_least(checkpoint, between):
    best = cost.best_interval(checkpoint, between)
    lost = cost.lost_share(best, checkpoint, between)
    assert lost <= cost.lost_share(2 * best, checkpoint, between)
    assert lost <= cost.lost_share(best / 2, checkpoint, between)


def test_the_best_interval_is_youngs_where_failures_are_rare_and_bounded_where_they_are_not():
    assert cost.best_interval(10, 1e9) == pytest.approx((2 * 10 * 1e9) ** 0.5, rel=1e-3)
    assert cost.best_interval(60, 20) == 20


def test_hours_and_failures_scale_with_gpus():
    assert cost.price(10, 8, 2.5) == 200
    assert cost.between_failures_s(50_000, 8) == 50_000 * 3600 / 8


def test_every_gpu_of_the_settings_is_known_and_the_cpu_is_measured():
    from latentray.config.plan import GPUS

    assert accelerators.NAMES == GPUS
    for one in accelerators.ACCELERATORS.values():
        assert one.reserved_bytes < one.memory_bytes and one.fp32_flops < one.bf16_flops
    half = accelerators.find("cpu", workers=2)
    assert half.memory_bytes == accelerators.machine_memory() // 2
    assert 1e8 < half.fp32_flops < 1e14
    with pytest.raises(ConfigError, match="gtx"):
        accelerators.find("gtx")
