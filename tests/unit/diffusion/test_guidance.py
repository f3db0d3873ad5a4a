"""Classifier-free guidance in closed form, with a scale per row."""

import torch

from latentray.diffusion import guidance


def test_the_formula_per_row():
    u, c = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[3.0], [3.0], [3.0]])
    assert guidance.classifier_free(u, c, torch.tensor([0.0, 1.0, 5.0])).flatten().tolist() == [1.0, 3.0, 11.0]


def test_a_scale_of_one_is_the_conditional_output_and_the_dtype_stays():
    u, c = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 3, 3).bfloat16()
    out = guidance.classifier_free(u, c, torch.ones(2))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, c, rtol=2e-2, atol=2e-2)
