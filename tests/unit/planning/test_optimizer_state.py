"""How many numbers each optimizer keeps: the closed forms, and what torch's own keep after a step."""

import pytest
import torch
from torch import nn

from latentray import build
from latentray.config import compose
from latentray.config.train import Train
from latentray.planning import optimizer_state


def network() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(6, 10), nn.Conv2d(3, 4, 5), nn.Embedding(7, 2)), nn.GroupNorm(1, 8))


@pytest.mark.parametrize(("name", "optimizer"), [("adamw", torch.optim.AdamW), ("adafactor", torch.optim.Adafactor)])
def test_the_count_is_that_of_what_torch_keeps(name, optimizer):
    net = network()
    made = optimizer(net.parameters())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    made.step()
    kept = sum(t.numel() for state in made.state.values() for key, t in state.items() if key != "step")
    assert optimizer_state.numbers(name, net) == kept


def test_muon_keeps_one_number_of_a_hidden_matrix_and_two_of_the_rest():
    net = network()
    inner = 6 * 10 + 4 * 3 * 5 * 5
    assert optimizer_state.numbers("muon", net) == 2 * sum(p.numel() for p in net.parameters()) - inner
    assert optimizer_state.staged("muon", net) == inner and optimizer_state.staged("adamw", net) == 0


def test_what_is_frozen_has_none():
    assert [optimizer_state.numbers(name, network().requires_grad_(False)) for name in ("adamw", "muon", "adafactor")] == [
        0, 0, 0,
    ]  # fmt: skip


def test_a_real_denoiser_takes_least_with_adafactor():
    with torch.device("meta"):
        net = build.denoiser(compose.load("train", Train, ["denoiser=unet_sd15"]).denoiser)
    parameters = build.parameter_count(net)
    shares = {name: optimizer_state.numbers(name, net) / parameters for name in ("adamw", "muon", "adafactor")}
    assert shares["adamw"] == 2.0 and 1.0 < shares["muon"] < 1.2 and shares["adafactor"] < 0.6
