"""Each family is one graph to torch.compile: no break, no value that the host has to wait for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from latentray import build
from latentray.config import compose
from latentray.config.train import Train

LEARNED = "unet_tiny_sd1 with a learned text encoder"
WITH = {LEARNED: ["denoiser=unet_tiny_sd1", "denoiser.context_layers=1", "denoiser.context_vocabulary=300"]}
NAMES = [*(name for name in compose.groups()["denoiser"] if "tiny" in name), *WITH]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_are_one_graph(name, checkpointed):
    overrides = [*WITH.get(name, [f"denoiser={name}"])]
    overrides += [f"denoiser.checkpoint_activations={str(checkpointed).lower()}"]
    overrides += ["stage=classifier"] if name.startswith("classifier") else []
    config = compose.load("train", Train, overrides).denoiser
    net = build.seeded(lambda: build.denoiser(config), 0)
    every = {
        "pooled": torch.randn(2, config.pooled_width or 1),
        "size": torch.rand(2, config.size_numbers),
        "labels": torch.tensor([0, 1]),
        "observations": torch.randn(2, config.observation_steps, config.observation_width or 1),
    }
    picture = (config.in_channels, 8, 8)
    shapes = {"video": (3, *picture), "policy": (config.action_steps, config.in_channels)}
    x, t, context = (
        torch.randn(2, *shapes.get(config.family, picture)),
        torch.tensor([1.0, 700.0]),
        torch.randn(2, 5, 16),
    )
    if name == LEARNED:
        context = torch.randint(0, 300, (2, config.context_tokens, 1))
    conditions = {key: every[key] for key in config.reads}
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=counting, fullgraph=True)  # fullgraph raises at a break
    for grad in (True, False):
        graphs.clear()
        with torch.set_grad_enabled(grad):
            y = compiled(x, t, context, **conditions)
            torch.testing.assert_close(y, net(x, t, context, **conditions), rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1
    compiled(x, t, context, **conditions).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
