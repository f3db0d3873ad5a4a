"""Which optimizer trains what, the schedules in closed form, and DeepSpeed's configuration held against DeepSpeed's own."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from latentray import build
from latentray.config import compose
from latentray.config.cluster import ClusterConfig
from latentray.config.deepspeed import BLOCKS, DERIVED, KINDS, REMOVED, DeepSpeedConfig
from latentray.config.optimizer import ALLOWED_STAGES, DECAYS, OPTIMIZERS, OptimizerConfig
from latentray.config.train import Train
from latentray.errors import ConfigError
from latentray.training import optimizers
from latentray.training.engine import _deepspeed_muon, deepspeed_config


def train(**changes) -> Train:
    return Train(**(dict(global_batch_size=96, total_samples=960, cluster=ClusterConfig(kind="none")) | changes))


def refused(**changes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        train(**changes)
    return caught.value


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), nn.Linear(8, 2))


def step(config: OptimizerConfig, net: nn.Module) -> torch.optim.Optimizer:
    made = optimizers.build(net, config, muon=_deepspeed_muon)
    net(torch.ones(3, 4)).square().mean().backward()
    made.step()
    return made


def test_the_tables_name_the_same_optimizers():
    assert set(OPTIMIZERS) == set(optimizers.BUILDERS) == set(optimizers.STATES) == set(ALLOWED_STAGES)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_optimizer_keeps_the_states_that_are_named(name):
    made = step(OptimizerConfig(name=name), network())
    kept = {key for state in made.state.values() for key, value in state.items() if value.ndim}
    assert kept == set(optimizers.STATES[name])


def test_the_first_step_of_adamw_in_closed_form():
    """m / sqrt(v) is the gradient's sign after one step."""
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step(OptimizerConfig(lr=1e-2, weight_decay=0.1, eps=1e-20), net)
    for name, p in net.named_parameters():
        expected = before[name] * (1 - 1e-2 * 0.1) - 1e-2 * p.grad.sign()
        torch.testing.assert_close(p.detach(), expected)


def test_the_first_step_of_adafactor_in_closed_form():
    """Of a vector: the gradient over its own size, so its sign; the step is lr x max(eps, RMS of the weights)."""
    net = network()
    before = net[0].bias.detach().clone()
    step(OptimizerConfig(name="adafactor", lr=0.5, weight_decay=0), net)
    rms = float(before.norm() / math.sqrt(before.numel()))
    torch.testing.assert_close(net[0].bias.detach(), before - 0.5 * max(1e-3, rms) * net[0].bias.grad.sign())


def test_muon_is_given_the_hidden_matrices_alone():
    net = network()
    assert optimizers.hidden_matrices(net) == [net[1][0].weight]
    made = optimizers.build(net, OptimizerConfig(name="muon", clip=0, lr=1e-3, muon_lr=1e-2), muon=_deepspeed_muon)
    matrices, rest = made.param_groups
    assert [p is net[1][0].weight for p in matrices["params"]] == [True]
    assert len(rest["params"]) == 7
    assert matrices[optimizers.LR_RATIO] == pytest.approx(10)
    assert [p.use_muon for p in net.parameters()] == [p is net[1][0].weight for p in net.parameters()]


@pytest.mark.parametrize(
    ("denoiser", "by_adamw"),
    [("unet_tiny_sd1", ("conv_in", "conv_out", "time_in", "time_out")), ("mmdit_tiny_sd3", ("patch_in", "proj_out"))],
)
def test_what_enters_and_leaves_a_denoiser_is_no_hidden_matrix(denoiser, by_adamw):
    config = compose.load("train", Train, [f"denoiser={denoiser}"])
    with torch.device("meta"):
        net = build.denoiser(config.denoiser)
    chosen = {id(p) for p in optimizers.hidden_matrices(net)}
    assert not chosen & {id(p) for name in by_adamw for p in getattr(net, name).parameters()}
    share = sum(p.numel() for p in net.parameters() if id(p) in chosen) / sum(p.numel() for p in net.parameters())
    assert share > 0.7


def test_embeddings_and_kernels_over_one_axis_are_left_to_adamw():
    inner = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv3d(4, 4, 3))
    assert optimizers.hidden_matrices(nn.Sequential(inner)) == [inner[2].weight]
    halves = nn.ModuleDict({"encoder": nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 3), "blocks": inner})})
    assert optimizers.hidden_matrices(halves) == [inner[2].weight]


def test_muon_without_matrices_is_refused():
    with pytest.raises(ConfigError, match="no hidden matrices"):
        optimizers.build(nn.Linear(3, 3), OptimizerConfig(name="muon", clip=0), muon=_deepspeed_muon)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stage_that_an_optimizer_does_not_mean_the_same_at_is_refused(name, stage):
    changes = dict(
        precision="fp32", optimizer=OptimizerConfig(name=name, clip=0), deepspeed=DeepSpeedConfig(zero_stage=stage)
    )
    if stage in ALLOWED_STAGES[name]:
        train(**changes)
    else:
        assert refused(**changes).where == "deepspeed.zero_stage"


def test_muon_is_neither_clipped_nor_offloaded():
    with pytest.raises(ConfigError, match="clips what Muon"):
        OptimizerConfig(name="muon")
    error = refused(
        optimizer=OptimizerConfig(name="muon", clip=0), deepspeed=DeepSpeedConfig(zero_stage=2, offload_optimizer="cpu")
    )
    assert error.where == "deepspeed.offload_optimizer"


@pytest.mark.parametrize("changes", [{"name": "sgd"}, {"decay": "wsd"}, {"decay_samples": 0}, {"muon_momentum": 1.0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError):
        OptimizerConfig(**changes)


def test_the_decay_begins_in_one_way_only():
    with pytest.raises(ConfigError, match="decay_samples"):
        OptimizerConfig(decay="linear", decay_from=0.5, decay_samples=100)


def test_warm_up_stable_decay_in_closed_form():
    linear = OptimizerConfig(lr=1.0, warmup_samples=100, decay="linear", decay_samples=200)
    assert [linear.lr_at(s, 1000) for s in (0, 50, 100, 800, 900, 1000)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0])
    root = OptimizerConfig(lr=1.0, decay="sqrt", decay_samples=400, final_fraction=0.2)
    assert [root.lr_at(s, 1000) for s in (600, 700, 1000)] == pytest.approx([1.0, 0.2 + 0.8 * 0.5, 0.2])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 500), st.integers(500, 5000), st.integers(0, 5000))
def test_the_stable_stretch_does_not_depend_on_the_runs_length(decay_samples, total, more):
    config = OptimizerConfig(lr=1.0, warmup_samples=10, decay="sqrt", decay_samples=decay_samples)
    for samples in range(0, total - decay_samples, 97):
        assert config.lr_at(samples, total) == config.lr_at(samples, total + more)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(DECAYS), st.integers(1, 1000), st.floats(0, 1), st.integers(0, 2000))
def test_every_decay_falls_from_the_peak_to_its_end(decay, decay_samples, final, samples):
    config = OptimizerConfig(lr=3.0, decay=decay, decay_samples=decay_samples, final_fraction=final)
    assert 3.0 * final - 1e-9 <= config.lr_at(samples, 1000) <= 3.0 + 1e-9
    assert config.lr_at(samples + 1, 1000) <= config.lr_at(samples, 1000) + 1e-9
    assert config.lr_at(1000, 1000) == pytest.approx(3.0 if decay == "constant" else 3.0 * final)


# ---- DeepSpeed's configuration


class Read(dict):
    """Notes which keys DeepSpeed asks for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.asked = set()

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self


def test_the_blocks_are_those_the_installed_deepspeed_asks_for():
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    given = Read({"train_batch_size": 1})
    Theirs(given)
    known = {name for name in BLOCKS if "." not in name} | set(DERIVED) | set(REMOVED)
    assert set(REMOVED) == set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert given.asked - known == set()
    assert known - given.asked == set()


def test_the_keys_of_blocks_are_those_of_the_installed_deepspeed():
    from deepspeed.compile.config import CompileConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    theirs = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "compile": CompileConfig,
        "bf16": DeepSpeedBF16Config,
    }
    for block, model in theirs.items():
        assert set(BLOCKS[block]) == {field.alias or name for name, field in model.model_fields.items()}, block
    assert set(BLOCKS["flops_profiler"]) == set(DeepSpeedFlopsProfilerConfig({}).__dict__)
    assert set(KINDS["activation_checkpointing"]) == set(ACT_CHKPT_DEFAULT)
    assert set(KINDS["aio"]) == set(AIO_DEFAULT_DICT)
    for block, defaults in (("activation_checkpointing", ACT_CHKPT_DEFAULT), ("aio", AIO_DEFAULT_DICT)):
        assert all(value is None or type(value) is KINDS[block][key] for key, value in defaults.items()), block
    assert set(KINDS[""]) <= set(BLOCKS)


@pytest.mark.parametrize("key", REMOVED)
def test_a_removed_block_is_refused_by_name(key):
    with pytest.raises(ConfigError, match=f"no longer has {key}"):
        DeepSpeedConfig(extra={key: {"enabled": True}})


@pytest.mark.parametrize(
    ("extra", "where", "mend"),
    [
        ({"flop_profiler": {}}, "flop_profiler", "flops_profiler"),
        ({"zero_optimization": {"reduce_bucket": 1}}, "zero_optimization.reduce_bucket", "reduce_bucket_size"),
        ({"zero_optimization": 2}, "zero_optimization", "stage"),
        (
            {"zero_optimization": {"offload_param": {"pin_memry": 1}}},
            "zero_optimization.offload_param.pin_memry",
            "pin_memory",
        ),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage", "deepspeed.zero_stage"),
        ({"zero_optimization": {"cpu_offload": True}}, "zero_optimization.cpu_offload", "offload_optimizer=cpu"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device",
            "deepspeed.offload_optimizer",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer", "optimizer.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "optimizer.decay"),
        ({"fp16": {"enabled": True}}, "fp16", "precision"),
        ({"quantum": 1}, "quantum", "Remove"),
        (
            {"activation_checkpointing": {"cpu_checkpoint": True}},
            "activation_checkpointing.cpu_checkpoint",
            "cpu_checkpointing",
        ),
        ({"activation_checkpointing": {"profile": "often"}}, "activation_checkpointing.profile", "true or false"),
        ({"steps_per_print": "often"}, "steps_per_print", "a whole number"),
        ({"aio": {"block_size": "much"}}, "aio.block_size", "a whole number"),
        ({"aio": {"queue_depth": True}}, "aio.queue_depth", "a whole number"),
    ],
)
def test_a_block_that_deepspeed_would_not_take_so_is_refused(extra, where, mend):
    with pytest.raises(ConfigError) as caught:
        DeepSpeedConfig(zero_stage=2, extra=extra)
    assert caught.value.where == f"deepspeed.extra.{where}"
    assert mend in caught.value.mend


@pytest.mark.parametrize(
    ("extra", "setting"),
    [
        ({"gradient_clipping": 0.5}, "optimizer.clip"),
        ({"bf16": {"enabled": False}}, "precision"),
        ({"bf16": {"bf16_optimizer_states": True}}, "precision"),
        ({"torch_autocast": {"enabled": True}}, "precision"),
        ({"torch_autocast": {"dtype": "float16"}}, "precision"),
    ],
)
def test_a_block_that_contradicts_a_setting_is_refused(extra, setting):
    error = refused(deepspeed=DeepSpeedConfig(extra=extra))
    assert setting in error.mend


def test_a_block_that_agrees_is_taken():
    extra = {"gradient_clipping": 1.0, "bf16": {"enabled": True, "check_grad_overflow": True}, "comms_logger": {"a": 1}}
    derived = deepspeed_config(train(deepspeed=DeepSpeedConfig(extra=extra)), 1)
    assert derived["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert derived["comms_logger"] == {"a": 1}


def test_offloads_need_something_to_offload_and_a_place():
    assert refused(precision="fp32", deepspeed=DeepSpeedConfig(zero_stage=0, offload_optimizer="cpu")).where == (
        "deepspeed.offload_optimizer"
    )
    assert refused(deepspeed=DeepSpeedConfig(zero_stage=2, offload_parameters="cpu")).where == (
        "deepspeed.offload_parameters"
    )
    for changes in ({"offload_optimizer": "nvme"}, {"offload_parameters": "nvme"}, {"nvme_path": "/scratch"}):
        with pytest.raises(ConfigError):
            DeepSpeedConfig(zero_stage=3, **changes)
    kept = DeepSpeedConfig(zero_stage=3, offload_parameters="nvme", nvme_path="/scratch")
    zero = deepspeed_config(train(deepspeed=kept), 1)["zero_optimization"]
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/scratch"}
    mapped = DeepSpeedConfig(zero_stage=2, offload_optimizer="nvme", nvme_path="/scratch")
    zero = deepspeed_config(train(deepspeed=mapped), 1)["zero_optimization"]
    assert (zero["offload_optimizer"], "offload_param" in zero) == ({"device": "cpu"}, False)
    theirs = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}
    with pytest.raises(ConfigError, match="'cpu'"):
        DeepSpeedConfig(zero_stage=2, offload_optimizer="nvme", nvme_path="/scratch", extra=theirs)


def test_a_machine_without_a_compiler_is_refused_by_name(monkeypatch, tmp_path):
    assert shutil.which("g++"), "the test needs a machine that has one"
    build.require_compiler()
    from torch._inductor import cpp_builder

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "g++"))
    cpp_builder.cpp_compiler_search.cache_clear()
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        build.require_compiler()
    cpp_builder.cpp_compiler_search.cache_clear()
