"""What a network's output y says about x_t = alpha x_0 + sigma noise.

Each prediction is linear: x_0 = p_x x_t + p_y y and noise = q_x x_t + q_y y. Training targets, x_0 and noise estimates and
the rows of a sampler's table all come from the four coefficients (Salimans & Ho 2022, appendix D; Liu et al. 2022).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficients:
    """x_0 = x0_x x_t + x0_y y; noise = noise_x x_t + noise_y y."""

    x0_x: Tensor
    x0_y: Tensor
    noise_x: Tensor
    noise_y: Tensor


def _epsilon(alpha: Tensor, sigma: Tensor) -> Coefficients:
    zero = alpha * 0
    return Coefficients(x0_x=1 / alpha, x0_y=-sigma / alpha, noise_x=zero, noise_y=zero + 1)


def _x0(alpha: Tensor, sigma: Tensor) -> Coefficients:
    zero = alpha * 0
    return Coefficients(x0_x=zero, x0_y=zero + 1, noise_x=1 / sigma, noise_y=-alpha / sigma)


def _v(alpha: Tensor, sigma: Tensor) -> Coefficients:
    return Coefficients(x0_x=alpha, x0_y=-sigma, noise_x=sigma, noise_y=alpha)


def _flow(alpha: Tensor, sigma: Tensor) -> Coefficients:
    zero = alpha * 0  # y = noise - x_0, alpha = 1 - sigma
    return Coefficients(x0_x=zero + 1, x0_y=-sigma, noise_x=zero + 1, noise_y=1 - sigma)


def _edm(alpha: Tensor, sigma: Tensor) -> Coefficients:
    """x_0 = c_skip x + c_out y (Karras et al. 2022, equation 7) on x_t = c_in x, where 1 - sigma^2 = alpha^2 sigma_data^2."""
    kept = 1 - sigma.square()
    root = kept.sqrt()
    return Coefficients(x0_x=kept / alpha, x0_y=sigma * root / alpha, noise_x=sigma, noise_y=-root)


_COEFFICIENTS = {"epsilon": _epsilon, "x0": _x0, "v": _v, "flow": _flow, "edm": _edm}


def coefficients(prediction: str, alpha: Tensor, sigma: Tensor) -> Coefficients:
    """The four coefficients of a prediction at noise levels (alpha, sigma)."""
    return _COEFFICIENTS[prediction](alpha, sigma)


def target(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What y should be; alpha and sigma broadcast against x0."""
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return alpha * noise - sigma * x0
    if prediction == "edm":
        root = (1 - sigma.square()).sqrt()  # alpha sigma_data
        return sigma * alpha / root * x0 - root * noise
    return noise - x0
