"""What is derived for DeepSpeed, and the clock of samples: pure functions of the configuration."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import DeepSpeedConfig
from latentray.config.optimizer import OptimizerConfig
from latentray.config.train import Train
from latentray.errors import ConfigError
from latentray.training.engine import deepspeed_config


def train(**changes) -> Train:
    return Train(**(dict(global_batch_size=96, total_samples=960, cluster=ClusterConfig(kind="none")) | changes))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(1, 64), st.none() | st.integers(1, 2000))
def test_micro_batches_make_up_the_global_batch(world, share, micro_batch_size):
    config = train(global_batch_size=world * share, total_samples=10_000, micro_batch_size=micro_batch_size)
    micro, accumulation = config.micro_and_accumulation(world)
    assert micro * accumulation * world == world * share
    assert 1 <= micro <= min(micro_batch_size or share, share)
    larger = [m for m in range(micro + 1, min(micro_batch_size or share, share) + 1) if share % m == 0]
    assert not larger


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 100), st.integers(1, 100))
def test_a_world_that_does_not_divide_is_refused_with_the_divisors(batch, world):
    config = train(global_batch_size=batch)
    if batch % world == 0:
        config.require_divisible(world)
        return
    with pytest.raises(ConfigError) as caught:
        config.micro_and_accumulation(world)
    assert caught.value.where == "global_batch_size"
    assert "among 1" in caught.value.mend


@pytest.mark.parametrize(
    ("world", "micro", "expected"), [(1, None, (96, 1)), (2, None, (48, 1)), (2, 20, (16, 3)), (3, 8, (8, 4))]
)
def test_batch_sizes_are_derived(world, micro, expected):
    derived = deepspeed_config(train(micro_batch_size=micro), world)
    assert (derived["train_micro_batch_size_per_gpu"], derived["gradient_accumulation_steps"]) == expected
    assert "train_batch_size" not in derived


def test_precision_and_zero_stage():
    bf16 = deepspeed_config(
        train(precision="bf16", deepspeed=DeepSpeedConfig(zero_stage=3, offload_optimizer="cpu")), 1
    )
    assert bf16["bf16"] == {"enabled": True}
    assert bf16["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert "bf16" not in deepspeed_config(train(precision="fp32"), 1)
    assert deepspeed_config(train(precision="autocast"), 1)["torch_autocast"]["dtype"] == "bfloat16"


def test_extra_is_merged_over_what_is_derived():
    extra = {"zero_optimization": {"overlap_comm": True}, "gradient_clipping": 1.0, "flops_profiler": {"enabled": True}}
    derived = deepspeed_config(train(deepspeed=DeepSpeedConfig(zero_stage=2, extra=extra)), 1)
    assert derived["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert derived["gradient_clipping"] == 1.0
    assert derived["flops_profiler"] == {"enabled": True}
    assert extra["zero_optimization"] == {"overlap_comm": True}


@pytest.mark.parametrize("key", ["train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_what_is_derived_cannot_be_overridden(key):
    with pytest.raises(ConfigError) as caught:
        DeepSpeedConfig(extra={key: 4})
    assert caught.value.where == f"deepspeed.extra.{key}"


def test_bf16_needs_a_sharded_master_copy():
    with pytest.raises(ConfigError, match="ZeRO stage 0"):
        train(precision="bf16", deepspeed=DeepSpeedConfig(zero_stage=0))


def test_the_learning_rate_in_closed_form():
    constant = OptimizerConfig(lr=1.0, warmup_samples=100)
    assert [constant.lr_at(s, 1000) for s in (0, 50, 100, 1000)] == [0.0, 0.5, 1.0, 1.0]
    cosine = OptimizerConfig(lr=2.0, decay="cosine", final_fraction=0.1)
    assert [cosine.lr_at(s, 1000) for s in (0, 500, 1000)] == pytest.approx([2.0, 2 * 0.55, 0.2])
    linear = OptimizerConfig(lr=1.0, decay="linear", decay_from=0.5)
    assert [linear.lr_at(s, 1000) for s in (0, 500, 750, 1000, 2000)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["constant", "cosine", "linear"]), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2000))
def test_the_learning_rate_stays_between_its_ends(decay, decay_from, final, samples):
    config = OptimizerConfig(lr=3.0, decay=decay, decay_from=decay_from, final_fraction=final)
    assert 3.0 * final - 1e-9 <= config.lr_at(samples, 1000) <= 3.0 + 1e-9
    assert config.lr_at(samples + 1, 1000) <= config.lr_at(samples, 1000) + 1e-9
