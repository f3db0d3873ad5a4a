"""Classifier-free guidance in closed form, with a scale per row."""

import math

import pytest
import torch

from latentray.diffusion import guidance
from latentray.errors import ConfigError


def test_the_formula_per_row():
    u, c = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[3.0], [3.0], [3.0]])
    assert guidance.classifier_free(u, c, torch.tensor([0.0, 1.0, 5.0])).flatten().tolist() == [1.0, 3.0, 11.0]


def test_a_scale_of_one_is_the_conditional_output_and_the_dtype_stays():
    u, c = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 3, 3).bfloat16()
    out = guidance.classifier_free(u, c, torch.ones(2))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, c, rtol=2e-2, atol=2e-2)


def test_rescale_gives_each_row_the_conditional_spread_by_its_share():
    generator = torch.Generator().manual_seed(0)
    u, c = torch.randn(2, 3, 4, 8, 8, generator=generator, dtype=torch.float64)
    guided = guidance.classifier_free(u, c, torch.full((3,), 7.5))
    out = guidance.rescale(guided, c, torch.tensor([0.0, 0.7, 1.0]))
    wide, narrow = guided.flatten(1).std(1), c.flatten(1).std(1)
    assert (wide > 3 * narrow).all()
    assert torch.equal(out[0], guided[0])
    share = torch.tensor([0.0, 0.7, 1.0]).double()
    torch.testing.assert_close(out.flatten(1).std(1), share * narrow + (1 - share) * wide, rtol=1e-6, atol=0)


def test_rescale_of_a_constant_output_stays_finite():
    flat = torch.zeros(1, 4, 8, 8)
    assert torch.isfinite(guidance.rescale(flat, torch.randn(1, 4, 8, 8), torch.tensor([0.7]))).all()


def test_guidance_acts_within_its_interval_of_noise_only():
    level = torch.tensor([math.inf, 10.0, 5.0, 1.0, 0.3, 0.0])
    scale, low, high = torch.full((6,), 7.0), torch.full((6,), 0.3), torch.full((6,), 5.0)
    assert guidance.within(scale, level, low, high).tolist() == [1, 1, 7, 7, 1, 1]
    always = guidance.within(scale[:5], level[:5], torch.zeros(5), torch.full((5,), math.inf))
    assert always.tolist() == [7] * 5  # pure noise, where the ratio is infinite, too


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("guidance_scale", {"scale": -0.1}), ("guidance_scale", {"scale": math.nan}), ("guidance_scale", {"scale": math.inf}),
        ("guidance_rescale", {"scale": 5.0, "rescale_share": 1.1}),
        ("guidance_rescale", {"scale": 5.0, "rescale_share": math.nan}),
        ("guidance_interval", {"scale": 5.0, "interval": (2.0, 1.0)}),
        ("guidance_interval", {"scale": 5.0, "interval": (-1.0, 1.0)}),
        ("guidance_interval", {"scale": 5.0, "interval": (math.nan, 1.0)}),
    ],
)  # fmt: skip
def test_bad_guidance_is_refused_by_its_field(where, values):
    with pytest.raises(ConfigError) as caught:
        guidance.check(values.pop("scale"), **values)
    assert caught.value.where == where
    guidance.check(0.0)
    guidance.check(7.5, rescale_share=0.7, interval=(0.3, 5.0))
