"""The policy's network: its size, its numbers by plain NumPy, what conditions it, and what it refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.errors import ConfigError
from latentray.models.policy import ActionUNet

SMALL = {
    "family": "policy", "in_channels": 3, "out_channels": 3, "context_width": None, "heads": None, "groups": 2,
    "channels": [4, 8, 12], "kernel": 3, "action_steps": 8, "observation_steps": 2, "observation_width": 5,
}  # fmt: skip


def config(**changes) -> DenoiserConfig:
    return DenoiserConfig(**(SMALL | changes))


def call(net: ActionUNet, seed: int = 0, batch: int = 2, steps: int = 8) -> tuple[torch.Tensor, ...]:
    """x, t and observations for it."""
    generator = torch.Generator().manual_seed(seed)
    c = net.config
    x = torch.randn(batch, steps, c.in_channels, generator=generator)
    seen = torch.randn(batch, c.observation_steps, c.observation_width, generator=generator)
    return x, torch.linspace(3.0, 700.0, batch), seen


def test_it_has_as_many_parameters_as_the_papers():
    """65,353,218: what the authors' notebook for Push-T prints as 6.535322e+07, two observations of five numbers."""
    paper = config(channels=[256, 512, 1024], kernel=5, groups=8, in_channels=2, out_channels=2, observation_width=5)
    with torch.device("meta"):
        assert build.parameter_count(build.denoiser(paper)) == 65_353_218


# ---- the same numbers by NumPy: loops over taps, no torch


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def conv(x_BCT, weight, bias, *, stride=1, padding):
    taps = weight.shape[2]
    padded = np.pad(x_BCT, ((0, 0), (0, 0), (padding, padding)))
    steps = (padded.shape[2] - taps) // stride + 1
    found = [np.einsum("bck,ock->bo", padded[:, :, t * stride : t * stride + taps], weight) for t in range(steps)]
    return np.stack(found, axis=2) + bias[None, :, None]


def grown(x_BCT, weight, bias):
    """Each step adds its four taps at twice its place; one is cut off at either end."""
    batch, _, steps = x_BCT.shape
    out = np.zeros((batch, weight.shape[1], 2 * steps + 2))
    for t in range(steps):
        out[:, :, 2 * t : 2 * t + 4] += np.einsum("bc,cok->bok", x_BCT[:, :, t], weight)
    return out[:, :, 1:-1] + bias[None, :, None]


def conv_block(state, name, x, groups):
    x = conv(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=1)
    batch, channels, steps = x.shape
    parts = x.reshape(batch, groups, -1)
    parts = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + 1e-5)
    scaled = parts.reshape(batch, channels, steps) * state[f"{name}.norm.weight"][None, :, None]
    return mish(scaled + state[f"{name}.norm.bias"][None, :, None])


def res_block(state, name, x, told, groups):
    film = mish(told) @ state[f"{name}.film.weight"].T + state[f"{name}.film.bias"]
    scale, shift = np.split(film[:, :, None], 2, axis=1)
    h = conv_block(state, f"{name}.second", scale * conv_block(state, f"{name}.first", x, groups) + shift, groups)
    if f"{name}.skip.weight" in state:
        x = conv(x, state[f"{name}.skip.weight"], state[f"{name}.skip.bias"], padding=0)
    return h + x


def reference(net: ActionUNet, x_BTA, t_B, seen_BTD) -> np.ndarray:
    state = {name: value.double().numpy() for name, value in net.state_dict().items()}
    levels, width, groups = len(net.config.channels), net.config.channels[0], net.config.groups
    angles = t_B[:, None] * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    time = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    time = mish(time @ state["time_in.weight"].T + state["time_in.bias"])
    time = time @ state["time_out.weight"].T + state["time_out.bias"]
    told = np.concatenate([time, seen_BTD.reshape(len(time), -1)], axis=1)
    h, kept = x_BTA.transpose(0, 2, 1), []
    for level in range(levels):
        for block in range(net.config.blocks):
            h = res_block(state, f"down.{level}.{block}", h, told, groups)
        kept.append(h)
        if level < levels - 1:
            h = conv(h, state[f"shrink.{level}.weight"], state[f"shrink.{level}.bias"], stride=2, padding=1)
    for block in range(net.config.blocks):
        h = res_block(state, f"middle.{block}", h, told, groups)
    for level in range(levels - 1):
        h = np.concatenate([h, kept.pop()], axis=1)
        for block in range(net.config.blocks):
            h = res_block(state, f"up.{level}.{block}", h, told, groups)
        h = grown(h, state[f"grow.{level}.weight"], state[f"grow.{level}.bias"])
    h = conv(conv_block(state, "last", h, groups), state["out.weight"], state["out.bias"], padding=0)
    return h.transpose(0, 2, 1)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    actions=st.integers(1, 4),
    seen=st.tuples(st.integers(1, 3), st.integers(1, 6)),
)
def test_it_computes_what_the_paper_says(seed, channels, blocks, actions, seen):
    made = config(
        channels=channels, blocks=blocks, in_channels=actions, out_channels=actions, observation_steps=seen[0],
        observation_width=seen[1],
    )  # fmt: skip
    net = build.seeded(lambda: ActionUNet(made), seed)
    x, t, observations = call(net, seed)
    with torch.no_grad():
        y = net(x, t, None, observations=observations)
    wanted = reference(net, x.double().numpy(), t.double().numpy(), observations.double().numpy())
    np.testing.assert_allclose(y.numpy(), wanted, atol=2e-5 * np.abs(wanted).max())


def test_every_parameter_gets_a_gradient():
    net = ActionUNet(config())
    x, t, seen = call(net)
    net(x, t, observations=seen).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_one_robot_sees_changes_its_own_actions_alone():
    net = build.seeded(lambda: ActionUNet(config()), 0).eval()
    x, t, seen = call(net)
    with torch.no_grad():
        base = net(x, t, observations=seen)
        for step in range(2):
            other = seen.clone()
            other[1, step, 2] += 1
            changed = net(x, t, observations=other)
            assert not torch.allclose(base[1], changed[1], atol=1e-4)
            torch.testing.assert_close(base[0], changed[0])
        later = net(x, torch.tensor([3.0, 10.0]), observations=seen)
    assert not torch.allclose(base[1], later[1], atol=1e-4)


def test_more_actions_than_it_learnt_are_taken_where_they_halve_evenly():
    net = ActionUNet(config())
    x, t, seen = call(net, steps=20)
    assert net(x, t, observations=seen).shape == (2, 20, 3)


def test_checkpointed_activations_change_no_gradient():
    def run(checkpointed: bool) -> list[torch.Tensor]:
        net = build.seeded(lambda: ActionUNet(config(checkpoint_activations=checkpointed)), 0)
        x, t, seen = call(net)
        y = net(x, t, observations=seen)
        y.square().mean().backward()
        return [y, *(p.grad for p in net.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("seen", [None, (2, 3, 5), (2, 2, 4), (2, 10)])
def test_observations_that_are_missing_or_of_another_shape_are_refused(seen):
    net = ActionUNet(config())
    x, t, _ = call(net)
    with pytest.raises(ConfigError) as caught:
        net(x, t, observations=None if seen is None else torch.zeros(seen))
    assert caught.value.where == "observations"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"observation_width": None}, "observation_width"),
        ({"observation_width": 0}, "observation_width"),
        ({"observation_steps": 0}, "observation_steps"),
        ({"action_steps": 6}, "action_steps"),
        ({"action_steps": 0}, "action_steps"),
        ({"kernel": 4}, "kernel"),
        ({"channels": []}, "channels"),
        ({"channels": [3]}, "channels"),
        ({"channels": [4, 7]}, "channels"),
        ({"out_channels": 4}, "out_channels"),
        ({"context_width": 8}, "context_width"),
        ({"pooled_width": 8}, "context_width"),
        ({"size_numbers": 6}, "size_numbers"),
        ({"classes": 3}, "classes"),
    ],
)
def test_bad_settings_are_refused_at_construction(changes, where):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert caught.value.where == f"denoiser.{where}"
    assert caught.value.mend
