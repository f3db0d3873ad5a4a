"""The classifier of noisy latents: its parts, what moves its logits, what it learns, and what it refuses."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from latentray import build
from latentray.config.denoiser import DenoiserConfig
from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import guidance, losses, schedules
from latentray.errors import ConfigError
from latentray.models.noisy_classifier import AttentionPool, MeanPool, NoisyClassifier
from latentray.models.unet import UNet

SMALL = {
    "family": "classifier", "channels": [8, 16], "blocks": 1, "depth": [0, 1], "heads": 2, "groups": 4,
    "context_width": None, "classes": 3,
}  # fmt: skip


def config(**changes) -> DenoiserConfig:
    return DenoiserConfig(**(SMALL | changes))


def made(seed: int = 0, **changes) -> NoisyClassifier:
    return build.seeded(lambda: NoisyClassifier(config(**changes)), seed)


X = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
T = torch.tensor([10.0, 700.0])


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_every_parameter_and_the_latent_get_a_gradient(pool):
    net, x = made(pool=pool), X.clone().requires_grad_()
    logits = net(x, T)
    assert logits.shape == (2, 3)
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert x.grad.flatten(1).any(dim=1).all()


def test_it_is_the_downward_half_of_the_u_net_of_the_same_seed():
    whole = build.seeded(lambda: UNet(config(family="unet", classes=None)), 0).state_dict()
    half = made().state_dict()
    begins = ("time_", "conv_in", "down.", "middle_")
    shared = [name for name in half if name.startswith(begins)]
    assert shared == [name for name in whole if name.startswith(begins)]
    assert all(torch.equal(half[name], whole[name]) for name in shared)
    own = {name.split(".")[0] for name in half if name not in shared}
    assert own == {"norm_out", "pool", "head"}


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_noise_level_and_latent_move_the_logits_of_their_own_sample_alone(pool):
    net = made(pool=pool).eval()
    with torch.no_grad():
        base = net(X, T)
        later = net(X, torch.tensor([10.0, 20.0]))
        other = net(torch.stack([X[0], X[1] + 1]), T)
    for changed in (later, other):
        assert (changed[1] - base[1]).abs().max() > 1e-3
        torch.testing.assert_close(changed[0], base[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [(8, 8), (7, 9), (2, 1), (32, 32)])
def test_any_height_and_width_is_taken(side):
    assert made()(torch.randn(1, 4, *side), T[:1]).shape == (1, 3)


def test_attention_pooling_by_loops():
    """The mean asks, it and all pixels with their places answer (Radford et al. 2021); no torch."""
    pool = build.seeded(lambda: AttentionPool(8, heads=2), 0).double()
    x = np.random.default_rng(0).normal(size=(8, 3, 2))
    w = {name: value.numpy() for name, value in pool.state_dict().items()}

    def waves(place):
        angles = [place * 10_000.0 ** (-k / 2) for k in range(2)]
        return [*np.cos(angles), *np.sin(angles)]

    pixels = [x[:, i, j] + np.array([*waves(i), *waves(j)]) for i in range(3) for j in range(2)]
    mean = x.reshape(8, -1).mean(axis=1)
    rows = np.stack([mean, *pixels])
    q = w["attn.to_q.weight"] @ mean + w["attn.to_q.bias"]
    k, v = (rows @ w[f"attn.to_{one}.weight"].T + w[f"attn.to_{one}.bias"] for one in "kv")
    found = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = np.exp(k[:, head] @ q[head] / 2)
        found.append((scores / scores.sum()) @ v[:, head])
    with torch.no_grad():
        np.testing.assert_allclose(pool(torch.from_numpy(x)[None])[0], np.concatenate(found), atol=1e-6)


def test_attention_pooling_tells_places_apart_and_the_mean_does_not():
    x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    turned = x.rot90(1, (2, 3))
    pool = build.seeded(lambda: AttentionPool(8, heads=2), 0)
    assert (pool(x) - pool(turned)).abs().max() > 1e-4
    torch.testing.assert_close(MeanPool()(x), MeanPool()(turned))


def test_checkpointed_activations_change_no_gradient():
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        net = made(checkpoint_activations=checkpointed)
        net(X, T).square().mean().backward()
        return [p.grad for p in net.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_it_learns_a_few_latents_by_heart():
    net = made(groups=8)
    x, labels = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 3
    t = torch.linspace(0, 999, 12)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x, t), labels)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02 and torch.equal(net(x, t).argmax(1), labels)


def test_trained_on_a_mixture_it_gives_the_gradient_that_is_known():
    """Latents N(m_c, s^2) of two classes: log p(c | x_t) is that of two normals at every noise level."""
    objective = ObjectiveConfig(schedule="cosine", prediction="v")
    schedule, spread = schedules.build(objective), 1.0
    made_by = torch.Generator().manual_seed(3)
    mean = 0.5 * torch.randn(4, 2, 2, generator=made_by)
    means = torch.stack([mean, -mean])
    net = made(channels=[16], depth=[0], middle_depth=0, groups=4, classes=2, heads=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

    def noised(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, 2, (count,), generator=made_by)
        x0 = means[labels] + spread * torch.randn(count, 4, 2, 2, generator=made_by)
        t = torch.randint(0, 1000, (count,), generator=made_by)
        noise = torch.randn(x0.shape, generator=made_by)
        return losses.noised(objective, schedule, x0, noise, t).x_BChw, t, labels

    for _ in range(150):
        x, t, labels = noised(128)
        optimizer.zero_grad()
        F.cross_entropy(net(x, t), labels).backward()
        optimizer.step()

    def exact(x, t):
        alpha, sigma = (one.float().view(-1, 1, 1, 1) for one in schedule.alpha_sigma(t))
        variance = (alpha * spread) ** 2 + sigma**2
        logits = [-((x - alpha * m) ** 2 / (2 * variance)).flatten(1).sum(1) for m in means]
        return torch.stack(logits, dim=1).log_softmax(1)[:, 1]

    x, t, labels = noised(512)
    wanted = guidance.gradient_of(exact, x, t).flatten(1)
    found = guidance.gradient_of(lambda at, t_B: net(at, t_B).log_softmax(1)[:, 1], x, t).flatten(1)
    matters = wanted.norm(dim=1) > 0.3  # elsewhere the class is certain, or nothing is known of it
    assert matters.float().mean() > 0.4
    assert F.cosine_similarity(found, wanted)[matters].mean() > 0.9
    right, best = ((one > 0.5) == (labels == 1) for one in (net(x, t).softmax(1)[:, 1], exact(x, t).exp()))
    assert float(right.float().mean()) > float(best.float().mean()) - 0.05


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"pool": "max"}, "denoiser.pool"),
        ({"classes": None}, "denoiser.classes"),
        ({"context_width": 16}, "denoiser.context_width"),
        ({"pooled_width": 16}, "denoiser.context_width"),
        ({"size_numbers": 6}, "denoiser.size_numbers"),
        ({"channels": [6, 6], "heads": 1, "groups": 2}, "denoiser.channels"),
        ({"depth": [1]}, "denoiser.depth"),
    ],
)
def test_what_a_classifier_cannot_be_is_refused(changes, where):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert caught.value.where == where and caught.value.mend


def test_a_mean_takes_channels_that_attention_does_not():
    assert config(channels=[6, 6], heads=1, groups=2, pool="mean").reads == ()
