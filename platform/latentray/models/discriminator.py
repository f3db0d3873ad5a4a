"""The PatchGAN discriminator (Isola et al. 2017) and its hinge losses (Lim & Ye 2017).

GroupNorm instead of BatchNorm: a batch statistic would depend on how many workers share the global batch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from latentray.models.layers import group_norm


class PatchDiscriminator(nn.Module):
    """(B,3,H,W) in [-1,1] -> (B,1,h,w) logits, one per receptive field.

    Args:
        channels: width of the first convolution; it doubles per layer up to eight times.
        layers: convolutions of stride two.
    """

    def __init__(self, *, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            out = min(channels * 2**layer, channels * 8)
            stride = 2 if layer < layers else 1
            stack += [
                nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False),
                group_norm(out, 16, eps=1e-5),
                nn.LeakyReLU(0.2),
            ]
            width = out
        stack.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.stack = nn.Sequential(*stack)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.stack(x_BCHW)


def discriminator_hinge(real: Tensor, fake: Tensor, weight_B: Tensor) -> Tensor:
    """mean(w max(0, 1 - D(x))) / 2 + mean(w max(0, 1 + D(G(x)))) / 2."""
    return 0.5 * (_mean(F.relu(1.0 - real.float()), weight_B) + _mean(F.relu(1.0 + fake.float()), weight_B))


def generator_hinge(fake: Tensor, weight_B: Tensor) -> Tensor:
    """-mean(w D(G(x)))."""
    return -_mean(fake.float(), weight_B)


def _mean(x: Tensor, weight_B: Tensor) -> Tensor:
    return (weight_B * x.flatten(1).mean(1)).mean()


def adaptive_weight(reconstruction_grad: Tensor, adversarial_grad: Tensor, *, limit: float = 1e4) -> Tensor:
    """|grad L_rec| / (|grad L_adv| + 1e-4) at the decoder's last layer, clamped (Esser et al. 2021, equation 7)."""
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0.0, limit)
