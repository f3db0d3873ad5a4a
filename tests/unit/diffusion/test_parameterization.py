"""What a network says: every prediction gives x_0 and the noise back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.diffusion import parameterization

PREDICTIONS = ("epsilon", "v", "x0", "flow")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(PREDICTIONS),
    st.floats(0.01, 0.99),
    st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=4),
)
def test_x0_and_noise_come_back_from_the_target(prediction, level, pairs):
    sigma = torch.tensor(level, dtype=torch.float64)
    alpha = 1 - sigma if prediction == "flow" else (1 - sigma.square()).sqrt()
    x0, noise = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    y = parameterization.target(prediction, x0, noise, alpha, sigma)
    x = alpha * x0 + sigma * noise
    c = parameterization.coefficients(prediction, alpha, sigma)
    torch.testing.assert_close(c.x0_x * x + c.x0_y * y, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(c.noise_x * x + c.noise_y * y, noise, rtol=1e-9, atol=1e-9)


def test_the_targets_in_closed_form():
    x0, noise, alpha, sigma = (torch.tensor(v) for v in (2.0, 3.0, 0.8, 0.6))
    got = {p: float(parameterization.target(p, x0, noise, alpha, sigma)) for p in PREDICTIONS}
    assert got == pytest.approx({"epsilon": 3.0, "x0": 2.0, "v": 0.8 * 3 - 0.6 * 2, "flow": 1.0})


def test_noise_levels_broadcast_per_sample():
    x0 = torch.randn(3, 4, 2, 2)
    sigma = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1)
    y = parameterization.target("v", x0, torch.zeros_like(x0), (1 - sigma.square()).sqrt(), sigma)
    torch.testing.assert_close(y, -sigma * x0)
