"""Each family is one graph to torch.compile: no break, no value that the host has to wait for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from latentray import build
from latentray.config import compose
from latentray.config.train import Train

LEARNED = "unet_tiny_sd1 with a learned text encoder"
WITH = {LEARNED: ["denoiser=unet_tiny_sd1", "denoiser.context_layers=1", "denoiser.context_vocabulary=300"]}
NAMES = [*(name for name in compose.groups()["denoiser"] if "tiny" in name), *WITH]


def _built(name: str, *more: str) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """A tiny network, and what it is called with."""
    overrides = [*WITH.get(name, [f"denoiser={name}"]), *more]
    overrides += ["stage=classifier"] if name.startswith("classifier") else []
    config = compose.load("train", Train, overrides).denoiser
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
        torch.randn(2, 5, config.context_width or 16),
    )
    if name == LEARNED:
        context = torch.randint(0, 300, (2, config.context_tokens, 1))
    net = build.seeded(lambda: build.denoiser(config), 0)
    return net, (x, t, context), {key: every[key] for key in config.reads}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_are_one_graph(name, checkpointed):
    net, given, conditions = _built(name, f"denoiser.checkpoint_activations={str(checkpointed).lower()}")
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=counting, fullgraph=True)  # fullgraph raises at a break
    for grad in (True, False):
        graphs.clear()
        with torch.set_grad_enabled(grad):
            y = compiled(*given, **conditions)
            torch.testing.assert_close(y, net(*given, **conditions), rtol=1e-4, atol=1e-5)
        assert len(graphs) == 1
    compiled(*given, **conditions).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet_tiny_sdxl", "mmdit_tiny_sd35", "video_tiny"])
def test_compiled_as_the_sampler_has_it_the_numbers_are_the_same(name):
    net, (x, *others), conditions = _built(name)
    net.eval().requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True)
    with torch.inference_mode(), build.tuned(torch.device("cpu")):
        for part in (slice(None), slice(1)):  # two rows, then one
            given = [x[part], *(one[part] for one in others)]
            told = {key: value[part] for key, value in conditions.items()}
            torch.testing.assert_close(compiled(*given, **told), net(*given, **told), rtol=1e-3, atol=1e-4)
