"""Distances between pictures (PSNR, SSIM) and between sets of pictures by their features (FID, KID). Pure functions.

rFID is the Fréchet distance between the features of originals and of their reconstructions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentray.models import torchvision_ops
from latentray.randomness import Purpose, keys_from_seeds, uniform

MAX_PSNR = 100.0
"""What identical pictures get, in dB, so that a mean over pictures stays finite."""


def psnr(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (B,): -10 log10 of each picture's mean squared error; values in [0, 1]."""
    _same_shape(x_BCHW, y_BCHW)
    mse_B = (x_BCHW.double() - y_BCHW.double()).square().flatten(1).mean(1)
    return (-10 * mse_B.clamp_min(10 ** (-MAX_PSNR / 10)).log10()).float()


def ssim(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004; Gaussian window, sigma 1.5), (B,); values in [0, 1]."""
    _same_shape(x_BCHW, y_BCHW)
    torchvision_ops.ensure_importable()  # torchmetrics imports torchvision
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(x_BCHW.float(), y_BCHW.float(), data_range=1.0, reduction="none")
    return value.reshape(-1)  # type: ignore[union-attr]


def frechet_distance(features_a_ND: Tensor, features_b_ND: Tensor) -> float:
    """Fréchet distance of two sets' Gaussian fits (Heusel et al. 2017), in float64. Rows are samples.

    |mu_a - mu_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^1/2). With C = R^T R (R from the QR of the centred, scaled
    features) the last trace is the sum of the singular values of R_a R_b^T: no matrix square root, whose error at small
    eigenvalues is the usual fault of this figure, and no harm from covariances that are singular.
    """
    a, b = _features(features_a_ND), _features(features_b_ND)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of widths {a.shape[1]} and {b.shape[1]} cannot be compared")
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = _covariance_root(a - mean_a), _covariance_root(b - mean_b)
    traces = root_a.square().sum() + root_b.square().sum()
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + traces - 2 * overlap
    return max(float(distance), 0.0)


def kernel_distance(
    features_a_ND: Tensor, features_b_ND: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel (inception) distance (Binkowski et al. 2018): mean and standard deviation over random subsets.

    The squared maximum mean discrepancy, unbiased (it can be negative), with k(x, y) = (x.y / D + 1)^3. Subsets are
    drawn without replacement, and hold `subset_size` samples or as many as the smaller set has.
    """
    a, b = _features(features_a_ND), _features(features_b_ND)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of widths {a.shape[1]} and {b.shape[1]} cannot be compared")
    size = min(subset_size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1  # every subset would be the whole
    values = []
    for i in range(subsets):
        rows_a, rows_b = _subset(seed, 2 * i, len(a), size), _subset(seed, 2 * i + 1, len(b), size)
        values.append(_unbiased_mmd(a[rows_a], b[rows_b]))
    result = torch.stack(values)
    return float(result.mean()), float(result.std(correction=0))


def _unbiased_mmd(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Squared MMD with the degree 3 polynomial kernel; the diagonals are left out (unbiased)."""
    n, m = len(a_ND), len(b_ND)
    within_a, within_b, between = _kernel(a_ND, a_ND), _kernel(b_ND, b_ND), _kernel(a_ND, b_ND)
    mean_a = (within_a.sum() - within_a.diagonal().sum()) / (n * (n - 1))
    mean_b = (within_b.sum() - within_b.diagonal().sum()) / (m * (m - 1))
    return mean_a + mean_b - 2 * between.mean()


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _subset(seed: int, counter: int, n: int, size: int) -> Tensor:
    draws_N = uniform(keys_from_seeds([seed], Purpose.ORDER, counter), (n,))[0]
    return draws_N.argsort(stable=True)[:size]


def _covariance_root(centred_ND: Tensor) -> Tensor:
    """R with R^T R = the unbiased covariance, at most (D, D)."""
    return torch.linalg.qr(centred_ND / (len(centred_ND) - 1) ** 0.5, mode="r").R


def _features(features_ND: Tensor) -> Tensor:
    if features_ND.ndim != 2 or len(features_ND) < 2:
        raise ValueError(f"features of shape {tuple(features_ND.shape)}: (N, D) with N >= 2 are wanted")
    if not torch.isfinite(features_ND).all():
        raise ValueError("features hold values that are not finite numbers")
    return features_ND.detach().double()


def _same_shape(x_BCHW: Tensor, y_BCHW: Tensor) -> None:
    if x_BCHW.shape != y_BCHW.shape:
        raise ValueError(f"pictures of shapes {tuple(x_BCHW.shape)} and {tuple(y_BCHW.shape)} cannot be compared")
