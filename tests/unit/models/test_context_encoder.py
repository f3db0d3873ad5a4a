"""The learned text encoder inside a denoiser: what it reads, that it learns, and what it refuses."""

import dataclasses

import pytest
import torch

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError

CONFIG = DenoiserConfig(
    channels=[8, 8], blocks=1, depth=[1, 0], heads=2, context_width=16, groups=4, context_layers=2, context_heads=2,
    context_tokens=6, context_vocabulary=30,
)  # fmt: skip
X, T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500])
IDS = torch.tensor([[1, 5, 29, 2, 2], [1, 7, 3, 2, 2]], dtype=torch.int32)[:, :, None]


@pytest.fixture(scope="module")
def net():
    net = build.seeded(lambda: build.denoiser(CONFIG), 0)
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    return net


@pytest.mark.parametrize("family", ["unet", "video"])
def test_a_context_that_was_read_once_gives_the_same_as_its_token_numbers(family):
    net = build.seeded(lambda: build.denoiser(dataclasses.replace(CONFIG, family=family)), 0)
    x = X if family == "unet" else X[:, None].repeat(1, 3, 1, 1, 1)
    context = net.read(IDS)
    assert context.shape == (2, 5, 16) and net.read(context) is context and net.read(None) is None
    torch.testing.assert_close(net(x, T, IDS), net(x, T, context))


def test_tokens_and_their_places_matter(net):
    context = net.read(IDS)
    assert (net.read(IDS.flip(1))[:, 2] - context[:, 2]).abs().max() > 1e-3  # the middle token has other neighbours
    other = IDS.clone()
    other[0, 4] = 9
    changed = (net.read(other) - context).abs().amax(dim=2)
    assert (changed[0] > 1e-6).all() and not changed[1].any()  # every token sees the last one; samples do not mix


def test_the_denoising_loss_reaches_the_embeddings_of_the_tokens_there_are(net):
    net.zero_grad()
    net(X, T, IDS).square().mean().backward()
    reached = net.context_encoder.token.weight.grad.abs().sum(1) > 0
    assert reached.nonzero().flatten().tolist() == [1, 2, 3, 5, 7, 29]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.context_encoder.blocks.parameters())


def test_a_network_without_one_has_the_weights_that_it_had():
    plain = dataclasses.replace(CONFIG, context_layers=0)
    one, other = (build.seeded(lambda c=c: build.denoiser(c), 3).state_dict() for c in (plain, CONFIG))
    assert one.keys() < other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {name.split(".")[0] for name in other.keys() - one.keys()} == {"context_encoder"}


def test_more_tokens_than_places_are_refused(net):
    with pytest.raises(ConfigError, match="7 tokens are more than 6"):
        net(X, T, torch.ones(2, 7, 1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"context_width": None}, "context_width"), ({"context_heads": 0}, "context_heads"),
        ({"context_vocabulary": None}, "context_vocabulary"), ({"combine": "sequence"}, "combine"),
        ({"pooled_width": 8}, "pooled_width"), ({"context_layers": -1}, "context_layers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(changes, where):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert caught.value.where == f"denoiser.{where}"
