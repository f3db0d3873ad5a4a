"""The learned variance: its two ends, the bound that learns it, and what a sampler makes of it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import losses, samplers, schedules, variance
from latentray.diffusion.executor import execute
from latentray.errors import ConfigError

CONFIG = ObjectiveConfig(schedule="linear", learned_variance=True)
SCHEDULE = schedules.build(CONFIG)
ABAR = SCHEDULE.alphas_cumprod.numpy()
BETA = 1 - ABAR[1:] / ABAR[:-1]  # of t = 1 ... T-1
POSTERIOR = BETA * (1 - ABAR[:-1]) / (1 - ABAR[1:])


def noised(t: list[int], prediction: str = "epsilon", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    config = dataclasses.replace(CONFIG, prediction=prediction)
    x0, noise, y, v = torch.randn(4, len(t), 3, 4, 4, generator=generator)
    return config, x0, losses.noised(config, SCHEDULE, x0, noise, torch.tensor(t)), y, v


def divergence(mean_q, log_q, mean_p, log_p):
    """KL of two normals in nats."""
    return 0.5 * (log_p - log_q + np.exp(log_q - log_p) + (mean_q - mean_p) ** 2 / np.exp(log_p) - 1)


@pytest.mark.parametrize("t", [1, 17, 500, 999])
def test_the_bound_is_the_divergence_of_the_two_posteriors(t):
    """Written out from Ho et al. 2020, equations 6 and 7, in numpy."""
    config, x0, batch, y, v = noised([t])
    got = variance.bound(config, SCHEDULE, y, v, x0, batch)
    abar, before, beta = ABAR[t], ABAR[t - 1], BETA[t - 1]
    x = batch.x_BChw.double().numpy()
    estimate = (x - math.sqrt(1 - abar) * y.double().numpy()) / math.sqrt(abar)

    def mean(x0):
        alpha = 1 - beta
        return math.sqrt(before) * beta / (1 - abar) * x0 + math.sqrt(alpha) * (1 - before) / (1 - abar) * x

    u = (v.double().numpy() + 1) / 2
    log_p = u * math.log(beta) + (1 - u) * math.log(POSTERIOR[t - 1])
    expected = divergence(mean(x0.double().numpy()), math.log(POSTERIOR[t - 1]), mean(estimate), log_p)
    assert float(got[0]) == pytest.approx(expected.mean() / math.log(2), rel=2e-4)


def test_at_the_last_step_it_is_the_density_of_the_clean_latent():
    config, x0, batch, y, v = noised([0])
    got = variance.bound(config, SCHEDULE, y, v, x0, batch)
    estimate = (batch.x_BChw.double() - math.sqrt(1 - ABAR[0]) * y.double()) / math.sqrt(ABAR[0])
    u = (v.double() + 1) / 2
    log_p = u * math.log(1 - ABAR[0]) + (1 - u) * math.log(POSTERIOR[0])
    density = torch.distributions.Normal(estimate, torch.exp(log_p / 2)).log_prob(x0.double())
    assert float(got[0]) == pytest.approx(float(-density.mean()) / math.log(2), rel=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_best_variance_of_a_perfect_mean_is_the_posteriors(prediction):
    """KL is least, and 0, where v = -1; a wrong mean wants more."""
    config, x0, batch, _, _ = noised([3, 300, 900], prediction)
    v = torch.full_like(x0, -1.0, requires_grad=True)
    exact = variance.bound(config, SCHEDULE, batch.target_BChw, v, x0, batch)
    assert exact.detach().abs().max() < 1e-3
    wrong = variance.bound(config, SCHEDULE, batch.target_BChw + 1, v, x0, batch)
    wrong.sum().backward()
    assert (v.grad < 0).all()  # downhill is wider


def test_only_the_variance_learns_from_it():
    config, x0, batch, y, v = noised([0, 5, 700])
    y.requires_grad_(), v.requires_grad_()
    error = losses.mean_squared(y, batch)
    whole = variance.hybrid(config, SCHEDULE, error, y, v, x0, batch).sum()
    of_y, of_v = torch.autograd.grad(whole, (y, v), retain_graph=True)
    (alone,) = torch.autograd.grad(error.sum(), y)
    assert torch.equal(of_y, alone) and of_v.abs().min() > 0
    bound = variance.bound(config, SCHEDULE, y, v, x0, batch)
    assert whole.detach().item() == pytest.approx(float((error + 0.001 * 1000 * bound).sum().detach()), rel=1e-5)


def test_an_output_is_split_into_prediction_and_variance():
    y = torch.randn(2, 8, 4, 4)
    prediction, v = variance.split(CONFIG, y)
    assert torch.equal(prediction, y[:, :4]) and torch.equal(v, y[:, 4:])
    clip, of_frames = variance.split(CONFIG, y[:, None].repeat(1, 3, 1, 1, 1))
    assert torch.equal(clip[:, 1], y[:, :4]) and torch.equal(of_frames[:, 2], y[:, 4:])
    assert variance.split(ObjectiveConfig(), y) == (y, None)


@pytest.mark.parametrize(("v", "ends"), [(-1.0, POSTERIOR), (1.0, BETA)])
def test_a_sampler_draws_with_the_variance_at_either_end(v, ends):
    """Two rows of the whole schedule: what is added to the mean has exactly the variance of the paper."""
    table = samplers.table("ddpm", SCHEDULE, "epsilon", 1000)
    learned = variance.LearnedNoise(SCHEDULE, [table], ["ddpm"])
    learned.note(torch.full((1, 1), v), [0])
    std = table.coefficients[:, 6]  # az
    ones = torch.ones(1, 1)
    for row in (0, 500, 990):
        drawn = float(std[row]) * float(learned.widened(ones, [0], row)[0, 0])
        assert drawn**2 == pytest.approx(ends[999 - row - 1], rel=1e-5)


def test_a_wider_variance_spreads_what_is_drawn_and_other_samplers_do_not_look_at_it():
    def spread(name: str, v: float) -> float:
        table = samplers.table(name, SCHEDULE, "epsilon", 40)
        learned = variance.LearnedNoise(SCHEDULE, [table], [name])
        generator = torch.Generator().manual_seed(0)

        def network(x, t, rows):
            learned.note(torch.full_like(x, v), [0])
            alpha, sigma = (value.view(-1, 1) for value in SCHEDULE.alpha_sigma(t.double()))
            return x * sigma / (alpha**2 * 0.25 + sigma**2)  # data N(0, 0.5^2)

        def fresh(rows, row):
            return learned.widened(torch.randn(1, 4000, generator=generator, dtype=torch.float64), rows, row)

        noise = torch.randn(1, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return float(execute([table], noise, network, fresh).std())

    narrow, middle, wide = (spread("ddpm", v) for v in (-1.0, 0.0, 1.0))
    assert narrow < middle < wide
    assert abs(middle - 0.5) < 0.05
    assert spread("euler_ancestral", 1.0) == pytest.approx(narrow, rel=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "flow", "prediction": "flow"}, {"variance_weight": 0.0},
        {"zero_terminal_snr": True, "prediction": "v"},
    ],
)  # fmt: skip
def test_where_no_variance_can_be_learned_it_is_refused(changes):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert caught.value.where == "objective.learned_variance"
