"""PatchGAN and its losses: closed forms, and no statistic across the batch."""

import pytest
import torch

from latentray.errors import ConfigError
from latentray.models.discriminator import PatchDiscriminator, adaptive_weight, discriminator_hinge, generator_hinge


def test_hinge_losses_in_closed_form():
    ones = torch.ones(3)
    real, fake = torch.tensor([[2.0], [0.0], [-1.0]]), torch.tensor([[-2.0], [0.0], [1.0]])
    assert float(discriminator_hinge(real, fake, ones)) == pytest.approx(0.5 * ((0 + 1 + 2) / 3 + (0 + 1 + 2) / 3))
    assert float(discriminator_hinge(ones[:, None], -ones[:, None], ones)) == 0.0
    assert float(generator_hinge(fake, ones)) == pytest.approx(1 / 3)
    assert discriminator_hinge(real.bfloat16(), fake.bfloat16(), ones).dtype == torch.float32
    without_last = torch.tensor([1.0, 1.0, 0.0])  # it stays in the divisor
    assert float(discriminator_hinge(real, fake, without_last)) == pytest.approx(0.5 * ((0 + 1) / 3 + (0 + 1) / 3))


def test_the_adaptive_weight_in_closed_form():
    rec, adv = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_weight(rec, adv)) == pytest.approx(5 / 2.0001)
    assert float(adaptive_weight(rec, torch.zeros(2))) == 1e4
    assert float(adaptive_weight(rec, adv, limit=2.0)) == 2.0
    assert float(adaptive_weight(torch.zeros(2), adv)) == 0.0


def test_a_logit_per_patch_that_does_not_depend_on_the_batch():
    net = PatchDiscriminator(channels=16, layers=2)
    x = torch.randn(3, 3, 32, 32)
    logits = net(x)
    assert logits.shape == (3, 1, 6, 6)
    torch.testing.assert_close(net(x[:1]), logits[:1], rtol=1e-4, atol=1e-5)


def test_channels_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="do not divide"):
        PatchDiscriminator(channels=4, layers=2)
