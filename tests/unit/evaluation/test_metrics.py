"""Metrics against closed forms, scipy and torch-fidelity."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.evaluation import metrics
from latentray.models import torchvision_ops


def gaussian(n, d, *, seed, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standardized(n, d, *, seed):
    """Samples whose mean is exactly 0 and whose unbiased covariance is exactly the identity."""
    x = gaussian(n, d, seed=seed)
    q = torch.linalg.qr(x - x.mean(0)).Q
    return q * (n - 1) ** 0.5


def frechet_by_scipy(a, b):
    a, b = a.numpy(), b.numpy()
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)


def test_psnr_of_a_known_error():
    x = torch.rand(2, 3, 8, 8) * 0.5
    y = x.clone()
    y[1] += 0.1
    assert metrics.psnr(x, y).tolist() == pytest.approx([metrics.MAX_PSNR, 20.0], abs=1e-4)


def test_psnr_is_per_picture():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert metrics.psnr(x, y).tolist() == pytest.approx([20.0, 40.0], abs=1e-4)


def test_ssim_is_one_on_equals_and_falls_with_noise():
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    assert metrics.ssim(x, x).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    some, much = metrics.ssim(x, x + 0.05 * noise), metrics.ssim(x, x + 0.3 * noise)
    assert some.shape == (3,) and (some < 1).all() and (much < some).all()


def test_ssim_of_constants_has_a_closed_form():
    x, y = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    c1 = 0.01**2
    expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
    assert metrics.ssim(x, y).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("function", [metrics.psnr, metrics.ssim])
def test_pictures_of_other_shapes_are_refused(function):
    with pytest.raises(ValueError, match="cannot be compared"):
        function(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 8))


@settings(max_examples=20, deadline=None)
@given(
    shift=st.floats(-3, 3),
    scales=st.lists(st.floats(0.01, 5), min_size=6, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_frechet_of_gaussians_with_commuting_covariances(shift, scales, seed):
    """|mu|^2 + sum (s_a - s_b)^2 where both covariances share their axes."""
    a, b = standardized(40, 6, seed=seed), standardized(50, 6, seed=seed + 1)
    scale = torch.tensor(scales, dtype=torch.float64)
    expected = 6 * shift**2 + float((scale - 1).square().sum())
    assert metrics.frechet_distance(a, b * scale + shift) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_frechet_agrees_with_scipy():
    mix = gaussian(5, 5, seed=3)
    a, b = gaussian(60, 5, seed=1), gaussian(70, 5, seed=2, shift=0.3) @ mix
    assert metrics.frechet_distance(a, b) == pytest.approx(frechet_by_scipy(a, b), rel=1e-8)


def test_frechet_of_singular_covariances():
    """Fewer samples than features: the matrix square root's weak spot. Equal sets are at 0, a shift is all there is."""
    a = gaussian(10, 64, seed=0, scale=100)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-7)
    assert metrics.frechet_distance(a, a + 0.5) == pytest.approx(64 * 0.25, rel=1e-8)
    assert metrics.frechet_distance(a, torch.zeros(2, 64)) == pytest.approx(
        float(a.mean(0).square().sum() + a.var(0).sum()), rel=1e-10
    )


def test_frechet_is_symmetric_and_turns_with_nothing():
    a, b = gaussian(30, 8, seed=4), gaussian(25, 8, seed=5, scale=2)
    turn = torch.linalg.qr(gaussian(8, 8, seed=6)).Q
    distance = metrics.frechet_distance(a, b)
    assert metrics.frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert metrics.frechet_distance(a @ turn, b @ turn) == pytest.approx(distance, rel=1e-10)


def test_kid_by_hand():
    """Features of width 1: k(x, y) = (xy + 1)^3; a = {0, 1}, b = {2, 3}."""
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    expected = 1.0 + 7.0**3 - 2 * (1 + 1 + 3.0**3 + 4.0**3) / 4
    assert metrics.kernel_distance(a, b) == (pytest.approx(expected), 0.0)


def test_kid_agrees_with_torch_fidelity():
    torchvision_ops.ensure_importable()
    from torch_fidelity.metric_kid import mmd2

    a, b = gaussian(40, 16, seed=1), gaussian(40, 16, seed=2, shift=0.5)
    kxx, kyy, kxy = (((p @ q.T) / 16 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b)))
    theirs = mmd2(kxx.numpy(), kxy.numpy(), kyy.numpy())
    assert metrics.kernel_distance(a, b)[0] == pytest.approx(float(theirs), rel=1e-9)


def test_kid_of_one_distribution_is_about_zero_and_grows_with_a_shift():
    a = gaussian(300, 8, seed=1)
    same, spread = metrics.kernel_distance(a, gaussian(300, 8, seed=2), subsets=20, subset_size=100)
    far, _ = metrics.kernel_distance(a, gaussian(300, 8, seed=2, shift=1), subsets=20, subset_size=100)
    assert abs(same) < 3 * spread and far > 10 * abs(same)


def test_kid_is_a_function_of_its_seed():
    a, b = gaussian(50, 4, seed=1), gaussian(60, 4, seed=2)
    first = metrics.kernel_distance(a, b, subsets=5, subset_size=20, seed=1)
    assert first == metrics.kernel_distance(a, b, subsets=5, subset_size=20, seed=1)
    assert first != metrics.kernel_distance(a, b, subsets=5, subset_size=20, seed=2)


@pytest.mark.parametrize("distance", [metrics.frechet_distance, metrics.kernel_distance])
@pytest.mark.parametrize(
    "bad", [torch.zeros(1, 4), torch.zeros(4), torch.full((3, 4), math.nan), torch.zeros(3, 5)], ids=str
)
def test_features_that_cannot_be_compared_are_refused(distance, bad):
    with pytest.raises(ValueError):
        distance(torch.zeros(3, 4), bad)
