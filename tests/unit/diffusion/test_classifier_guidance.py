"""Classifier guidance on a mixture of two normals, whose scores are known at every noise level."""

import pytest
import torch

from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import guidance, parameterization, samplers, schedules

SCHEDULE = schedules.build(ObjectiveConfig(schedule="cosine"))
MEANS, STD = torch.tensor([-1.5, 1.0], dtype=torch.float64), 0.4
SHARES = torch.tensor([0.7, 0.3], dtype=torch.float64)


def levels(t):
    return (value.view(-1, 1) for value in SCHEDULE.alpha_sigma(t.double()))


def log_joint(x, t):
    """(B, 2): log p(c) p(x_t | c)."""
    alpha, sigma = levels(t)
    of_class = torch.distributions.Normal(alpha * MEANS, (alpha**2 * STD**2 + sigma**2).sqrt())
    return SHARES.log() + of_class.log_prob(x)


def network(prediction: str):
    """The exact network of the whole mixture."""

    def call(x, t):
        score = guidance.gradient_of(lambda at, t_B: log_joint(at, t_B).logsumexp(1), x, t)
        alpha, sigma = levels(t)
        noise = -sigma * score
        return parameterization.target(prediction, (x - sigma * noise) / alpha, noise, alpha, sigma)

    return call


def guided(prediction: str, scale: float):
    plain = network(prediction)

    def call(x, t):
        alpha, sigma = SCHEDULE.alpha_sigma(t.double())
        gradient = guidance.gradient_of(lambda at, t_B: log_joint(at, t_B).log_softmax(1)[:, 1], x, t)
        scales = torch.full((len(x),), scale, dtype=torch.float64)
        return guidance.classifier(plain(x, t), gradient, scales, prediction=prediction, alpha_B=alpha, sigma_B=sigma)

    return call


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_guided_output_is_that_of_the_class_alone(prediction):
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], torch.full((9,), 400)
    alpha, sigma = levels(t)
    score = guidance.gradient_of(lambda at, t_B: log_joint(at, t_B)[:, 1], x, t)
    expected = parameterization.target(prediction, (x + sigma**2 * score) / alpha, -sigma * score, alpha, sigma)
    torch.testing.assert_close(guided(prediction, 1.0)(x, t), expected)
    torch.testing.assert_close(guided(prediction, 0.0)(x, t), network(prediction)(x, t))


def test_what_is_drawn_is_the_class_and_stronger_guidance_narrows_it():
    noise = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def drawn(denoise):
        with torch.inference_mode():
            return samplers.sample(denoise, noise, SCHEDULE, "dpmpp_2m", 25, prediction="v")

    whole, one, strong = drawn(network("v")), drawn(guided("v", 1.0)), drawn(guided("v", 4.0))
    assert abs(float((whole < -0.3).double().mean()) - 0.7) < 0.05
    assert abs(float(one.mean()) - 1.0) < 0.05 and abs(float(one.std()) - STD) < 0.03
    assert float(strong.mean()) > float(one.mean()) and float(strong.min()) > float(one.min())
