"""The MMDiT: where it begins, what conditions it, the crop of its positions, and what it refuses."""

import pytest
import torch

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models.mmdit import MMDiT

SHARED = dict(
    family="mmdit", context_width=6, pooled_width=5, heads=2, head_dim=8, layers=3, max_grid=9, base_grid=4
)  # fmt: skip
SD3 = DenoiserConfig(**SHARED)
SD35 = DenoiserConfig(**SHARED, qk_norm=True, dual_attention=[0, 1])


def made(config: DenoiserConfig, *, random: bool = True) -> MMDiT:
    """A network; with random weights everywhere, or as it begins."""
    net = build.seeded(lambda: MMDiT(config), 0).eval()
    if random:
        generator = torch.Generator().manual_seed(0)
        for parameter in net.parameters():
            parameter.data.normal_(0, 0.3, generator=generator)
    return net


def inputs(batch: int = 2, side: tuple[int, int] = (6, 8)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, 4, *side), (batch, 3, 6), (batch, 5))
    x, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, torch.full((batch,), 250.0), context, pooled


@pytest.mark.parametrize("config", [SD3, SD35], ids=["sd3", "sd35"])
def test_it_begins_as_zero_and_every_block_as_the_identity(config):
    net = made(config, random=False)
    x, t, context, pooled = inputs()
    assert not net(x, t, context, pooled=pooled).any()
    tokens, text, vector = torch.randn(2, 12, 16), torch.randn(2, 3, 16), torch.randn(2, 16)
    for block in net.blocks:
        assert all(torch.equal(*both) for both in zip(block(tokens, text, vector), (tokens, text), strict=True))


@pytest.mark.parametrize("config", [SD3, SD35], ids=["sd3", "sd35"])
def test_every_parameter_gets_a_gradient(config):
    net = made(config)
    x, t, context, pooled = inputs()
    net(x, t, context, pooled=pooled).square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # The text of the last block is read only: nothing is attended from it, though the layout holds its queries.
    assert sorted(idle) == sorted(
        name
        for name, _ in net.named_parameters()
        if name.startswith(("blocks.2.text.attn.to_q", "blocks.2.text.attn.norm_q"))
    )


@pytest.mark.parametrize("config", [SD3, SD35], ids=["sd3", "sd35"])
def test_every_condition_changes_the_prediction_of_its_sample_alone(config):
    net = made(config)
    given = dict(zip(("u_BChw", "t_B", "context_BLD", "pooled"), inputs(), strict=True))
    with torch.no_grad():
        base = net(**given)
        for name, value in given.items():
            other = value.clone()
            other[1] = other[1] + 2
            changed = net(**given | {name: other})
            assert not torch.allclose(base[1], changed[1], atol=1e-5), name
            torch.testing.assert_close(base[0], changed[0], rtol=1e-4, atol=1e-4)


def test_the_order_of_text_tokens_does_not_matter_and_that_of_patches_does():
    net = made(SD3)
    x, t, context, pooled = inputs()
    base = net(x, t, context, pooled=pooled)
    torch.testing.assert_close(base, net(x, t, context.flip(1), pooled=pooled), rtol=1e-4, atol=1e-4)
    turned = net(x.roll(2, dims=-1), t, context, pooled=pooled)
    assert not torch.allclose(base.roll(2, dims=-1), turned, atol=1e-3)


def test_positions_are_cropped_from_the_middle_of_the_table():
    net = made(SD3)
    assert torch.equal(net._positions(18, 18), net.positions.flatten(0, 1))
    assert torch.equal(net._positions(6, 8), net.positions[3:6, 2:6].flatten(0, 1))


def test_a_patch_stays_where_it_was():
    """With blocks that do nothing, each patch of the output depends on the same patch of the input alone."""
    net = made(SD3, random=False)
    torch.nn.init.normal_(net.proj_out.weight)
    x, t, context, pooled = inputs(1)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(net(x, t, context, pooled=pooled)[0, 1, 2:4, 4:6].sum(), x)
    reached = gradient[0].abs().sum(0) > 0
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(reached, expected)


def test_text_and_pooled_text_are_refused_by_name_where_missing_and_sizes_ignored():
    net = made(SD3)
    x, t, context, pooled = inputs()
    for arguments, where in (((x, t), "context"), ((x, t, context), "pooled")):
        with pytest.raises(ConfigError) as caught:
            net(*arguments, pooled=pooled if where == "context" else None)
        assert caught.value.where == where
    told = net(x, t, context, pooled=pooled, size=torch.ones(2, 6), labels=torch.tensor([1, 2]))
    assert torch.equal(told, net(x, t, context, pooled=pooled))


@pytest.mark.parametrize("side", [(5, 6), (20, 6)])
def test_a_latent_that_is_no_grid_of_patches_is_refused(side):
    x, t, context, pooled = inputs(side=side)
    with pytest.raises(ConfigError, match="at most 9 along each side"):
        made(SD3)(x, t, context, pooled=pooled)


def test_checkpointed_activations_change_no_gradient():
    x, t, context, pooled = inputs()
    gradients = []
    for checkpointed in (False, True):
        net = made(DenoiserConfig(**vars(SD35) | {"checkpoint_activations": checkpointed}))
        net(x, t, context, pooled=pooled).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"head_dim": None}, "denoiser.heads"),
        ({"level_heads": [2]}, "denoiser.heads"),
        ({"heads": 1, "head_dim": 6}, "denoiser.head_dim"),
        ({"context_width": None}, "denoiser.context_width"),
        ({"size_numbers": 6}, "denoiser.size_numbers"),
        ({"classes": 3}, "denoiser.classes"),
        ({"dual_attention": [3]}, "denoiser.dual_attention"),
        ({"layers": 0}, "denoiser.layers"),
        ({"patch": 0}, "denoiser.patch"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, where):
    with pytest.raises(ConfigError) as caught:
        DenoiserConfig(**SHARED | changes)
    assert caught.value.where == where
    assert caught.value.mend
