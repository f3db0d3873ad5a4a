"""The U-Net: its sizes and numbers, what conditions it, what it refuses, and memory against time."""

import pytest
import torch

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models.unet import UNet

SD1 = DenoiserConfig(channels=[8, 16, 16], blocks=2, depth=[1, 1, 0], heads=2, context_width=6, groups=4)
SD2 = DenoiserConfig(
    channels=[8, 16], blocks=1, depth=[0, 2], middle_depth=2, heads=None, head_dim=8, context_width=6,
    linear_projection=True, groups=4,
)  # fmt: skip
SDXL = DenoiserConfig(
    channels=[8, 16], blocks=1, depth=[0, 1], heads=None, level_heads=[2, 4], context_width=6, pooled_width=5,
    size_numbers=6, size_width=4, linear_projection=True, groups=4,
)  # fmt: skip
CLASSES = DenoiserConfig(channels=[8], blocks=1, depth=[1], heads=2, context_width=None, groups=4, classes=3)


def given(config: DenoiserConfig, batch: int = 2) -> dict[str, torch.Tensor]:
    """Conditions that this network reads."""
    generator = torch.Generator().manual_seed(0)
    every = {
        "pooled": torch.randn(batch, config.pooled_width or 1, generator=generator),
        "size": torch.randint(64, 1024, (batch, config.size_numbers), generator=generator).float(),
        "labels": torch.arange(batch) % (config.classes or 1),
    }
    text = {} if config.context_width is None else {"context": torch.randn(batch, 5, config.context_width)}
    return text | {name: every[name] for name in config.reads}


def call(net: UNet, x: torch.Tensor, t: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
    return net(x, t, conditions.get("context"), **{name: conditions[name] for name in net.config.reads})


def test_the_quickstarts_network_begins_with_the_weights_it_always_had():
    config = DenoiserConfig(
        channels=[128, 128], blocks=1, depth=[0, 1], heads=None, head_dim=64, context_width=64, linear_projection=True
    )
    net = build.seeded(lambda: UNet(config), 0)
    state = net.state_dict()
    assert build.parameter_count(net) == 5_633_668
    assert len(state) == 206
    assert list(state)[:3] == ["time_in.weight", "time_in.bias", "time_out.weight"]
    assert list(state)[-1] == "conv_out.bias"
    sums = [
        float(state[name].double().sum()) for name in ("time_in.weight", "middle_in.res.conv1.weight", "conv_out.bias")
    ]
    assert sums == pytest.approx([2.754174, -0.995299, 0.010461], abs=1e-4)


@pytest.mark.parametrize("config", [SD1, SD2, SDXL, CLASSES], ids=["sd1", "sd2", "sdxl", "classes"])
def test_every_parameter_gets_a_gradient(config):
    net = UNet(config)
    call(net, torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), given(config)).square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("config", [SD2, SDXL, CLASSES], ids=["sd2", "sdxl", "classes"])
def test_every_condition_changes_the_prediction_of_its_sample_alone(config):
    net = build.seeded(lambda: UNet(config), 0).eval()
    x, t, conditions = torch.randn(2, 4, 4, 4), torch.tensor([10.0, 10.0]), given(config)
    with torch.no_grad():
        base = call(net, x, t, conditions)
        assert torch.equal(base, call(net, x, t, conditions))
        later = call(net, x, torch.tensor([10.0, 900.0]), conditions)
        assert not torch.allclose(base[1], later[1]) and torch.allclose(base[0], later[0], atol=1e-6)
        for name, value in conditions.items():
            other = value.clone()
            other[1] = other[1] + 2
            changed = call(net, x, t, conditions | {name: other})
            assert not torch.allclose(base[1], changed[1], atol=1e-6), name
            torch.testing.assert_close(base[0], changed[0], rtol=1e-5, atol=1e-6)


def test_conditions_it_has_no_use_for_are_ignored():
    net = UNet(SD2).eval()
    x, t, context = torch.randn(1, 4, 4, 4), torch.tensor([1.0]), torch.randn(1, 3, 6)
    told = net(x, t, context, pooled=torch.randn(1, 9), size=torch.randn(1, 6), labels=torch.tensor([5]))
    assert torch.equal(net(x, t, context), told)


@pytest.mark.parametrize(
    ("config", "missing"), [(SD2, "context"), (SDXL, "pooled"), (SDXL, "size"), (CLASSES, "labels")]
)
def test_a_condition_it_reads_and_does_not_get_is_refused_by_name(config, missing):
    conditions = given(config) | {missing: None}
    with pytest.raises(ConfigError) as caught:
        call(UNet(config), torch.randn(2, 4, 4, 4), torch.tensor([1.0, 2.0]), conditions)
    assert caught.value.where == missing


def test_the_null_class_is_one_more_class():
    net = UNet(CLASSES).eval()
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([1.0])
    drawn = [net(x, t, labels=torch.tensor([label])) for label in range(CLASSES.classes + 1)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    with pytest.raises(IndexError):
        net(x, t, labels=torch.tensor([CLASSES.classes + 1]))


def test_an_unconditional_network_takes_no_text():
    config = DenoiserConfig(channels=[8], blocks=1, depth=[1], heads=2, context_width=None, groups=4)
    net = UNet(config).eval()
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([1.0])
    assert net(x, t).shape == (1, 4, 4, 4)
    assert torch.equal(net(x, t), net(x, t, torch.randn(1, 3, 7)))


@pytest.mark.parametrize("side", [(8, 8), (7, 9), (5, 1)])
def test_any_height_and_width_is_taken(side):
    assert call(UNet(SD1), torch.randn(1, 4, *side), torch.tensor([1.0]), given(SD1, 1)).shape == (1, 4, *side)


@pytest.mark.parametrize("config", [SD1, SDXL], ids=["sd1", "sdxl"])
def test_checkpointed_activations_change_no_gradient_and_keep_less(config):
    def run(checkpointed: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        values = vars(config) | {"checkpoint_activations": checkpointed}
        net = build.seeded(lambda: UNet(DenoiserConfig(**values)), 0)
        kept: set[tuple[int, int]] = set()

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, torch.nn.Parameter):
                kept.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
            return tensor

        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        conditions = given(config) | {"context": torch.ones(2, 5, 6)}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = call(net, x, torch.tensor([1.0, 500.0]), conditions)
        y.square().mean().backward()
        return y, [p.grad for p in net.parameters()], sum(size for _, size in kept)

    (plain, gradients, whole), (again, recomputed, less) = run(False), run(True)
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed, strict=True))
    assert less < 0.4 * whole


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"family": "dit"}, "denoiser.family"),
        ({"channels": [10], "depth": [1]}, "denoiser.channels"),
        ({"channels": [], "depth": []}, "denoiser.channels"),
        ({"channels": [3], "depth": [0], "groups": 3, "heads": 1}, "denoiser.channels"),
        ({"channels": [32], "depth": [1], "heads": 5}, "denoiser.heads"),
        ({"channels": [32], "depth": [1], "heads": None}, "denoiser.heads"),
        ({"channels": [32], "depth": [1], "head_dim": 8}, "denoiser.head_dim"),
        ({"channels": [32], "depth": [1], "heads": 0}, "denoiser.heads"),
        ({"channels": [32], "depth": [1], "heads": None, "level_heads": [3]}, "denoiser.level_heads"),
        ({"channels": [32], "depth": [1], "heads": None, "level_heads": [4, 4]}, "denoiser.level_heads"),
        ({"channels": [32], "depth": [1, 1]}, "denoiser.depth"),
        ({"channels": [32], "depth": [-1]}, "denoiser.depth"),
        ({"in_channels": 0}, "denoiser.in_channels"),
        ({"blocks": 0}, "denoiser.blocks"),
        ({"middle_depth": -1}, "denoiser.middle_depth"),
        ({"groups": 0}, "denoiser.groups"),
        ({"classes": 0}, "denoiser.classes"),
        ({"pooled_width": 0}, "denoiser.pooled_width"),
        ({"size_numbers": 6, "size_width": 5}, "denoiser.size_width"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, where):
    with pytest.raises(ConfigError) as caught:
        DenoiserConfig(**changes)
    assert caught.value.where == where
    assert isinstance(caught.value, ValueError)
    assert caught.value.mend
