"""Guidance: from several network outputs to the one a sampler's row uses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentray.config.bounds import check_guidance as check
from latentray.diffusion import parameterization

__all__ = ["Classifier", "check", "classifier", "classifier_free", "gradient_of", "rescale", "within"]

Classifier = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents x_t (B, ...), t (B,), classes (B,) int64) -> log p(class | x_t), (B,): differentiable over x_t."""


def classifier_free(unconditional: Tensor, conditional: Tensor, scale_B: Tensor) -> Tensor:
    """y_u + g (y_c - y_u) per row (Ho & Salimans 2022, equation 6, with g = 1 + w)."""
    g = _wide(scale_B, conditional)
    return unconditional + g * (conditional - unconditional)


def rescale(guided: Tensor, conditional: Tensor, share_B: Tensor) -> Tensor:
    """Give the guided output the conditional one's standard deviation, by a share per row (Lin et al. 2024, equations 15-16).

    Strong guidance widens the output and so oversaturates; share 0 changes nothing, the paper uses 0.7.
    """
    dims = tuple(range(1, guided.ndim))
    ratio = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True).clamp(min=1e-12)
    phi = _wide(share_B, guided)
    return guided * (phi * ratio + (1 - phi))


def classifier(
    y: Tensor, gradient: Tensor, scale_B: Tensor, *, prediction: str, alpha_B: Tensor, sigma_B: Tensor
) -> Tensor:
    """A network's output moved by a classifier: noise - g sigma grad log p(c | x_t) (Dhariwal & Nichol 2021, algorithm 2).

    Args:
        y: what a network of this prediction said of x_t = alpha x_0 + sigma noise, alpha > 0.
        gradient: of log p(c | x_t) over x_t (`gradient_of`).
        scale_B: g; 1 draws from p(x) p(c | x), more from p(x) p(c | x)^g.

    Pure noise says nothing of a class: where y does not speak of the noise there, it stays as it is.
    """
    of_noise = parameterization.coefficients(prediction, alpha_B.double(), sigma_B.double()).noise_y
    moved = torch.where(of_noise == 0, torch.zeros_like(of_noise), scale_B * sigma_B / of_noise)
    return y - _wide(moved, y) * gradient.to(y.dtype)


def gradient_of(log_probability: Callable[[Tensor, Tensor], Tensor], x: Tensor, t_B: Tensor) -> Tensor:
    """The gradient over x of log p(c | x_t), (B,), as a classifier of noisy latents gives it; also where none are kept."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        return torch.autograd.grad(log_probability(at, t_B.clone()).sum(), at)[0]


def within(scale_B: Tensor, noise_to_signal_B: Tensor, low_B: Tensor, high_B: Tensor) -> Tensor:
    """The scale where sigma/alpha lies in (low, high], 1 elsewhere (Kynkaanniemi et al. 2024, equation 5).

    Guidance harms at high noise, where it narrows what is drawn, and is idle at low noise.
    """
    inside = (noise_to_signal_B > low_B) & (noise_to_signal_B <= high_B)
    return torch.where(inside, scale_B, torch.ones_like(scale_B))


def _wide(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.view(-1, *([1] * (like.ndim - 1))).to(like.dtype)
