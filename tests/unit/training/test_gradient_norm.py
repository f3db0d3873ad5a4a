"""Sums of squares in one pass: against fp64, over any cut, on any number of threads. `test_zero_worlds.py` has the norms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.models import fused
from latentray.training.gradient_norm import sum_of_squares

TYPES = [torch.float32, torch.bfloat16]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9000), min_size=1, max_size=6), st.sampled_from(TYPES), st.integers(-20, 20))
def test_it_is_the_sum_in_fp64(sizes: list[int], dtype: torch.dtype, power: int) -> None:
    made = torch.Generator().manual_seed(len(sizes))
    tensors = [torch.randn(size, generator=made).mul(2.0**power).to(dtype) for size in sizes]
    exact = sum(float(one.double().square().sum()) for one in tensors)
    assert float(sum_of_squares(tensors)) == pytest.approx(exact, rel=2e-6)


def test_without_a_compiler_and_with_strides_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(300, 7).bfloat16(), torch.randn(5).bfloat16()]
    exact = sum(float(one.double().square().sum()) for one in tensors)
    strided = [tensors[0].t(), tensors[1]]
    assert not fused.squares(strided)
    assert float(sum_of_squares(strided)) == pytest.approx(exact, rel=1e-6)
    monkeypatch.setattr(fused, "available", lambda: False)
    assert float(sum_of_squares(tensors)) == pytest.approx(exact, rel=1e-6)
    assert float(sum_of_squares([])) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_one_number_that_is_none_spoils_it(bad: float, dtype: torch.dtype) -> None:
    tensors = [torch.ones(5000, dtype=dtype), torch.ones(7, dtype=dtype)]
    for where in (0, 4097, 4999):
        tensors[0].fill_(1)[where] = bad
        assert not math.isfinite(float(sum_of_squares(tensors)))


def test_threads_change_no_bit() -> None:
    tensors, threads = [torch.randn(n) for n in (100_000, 3, 70_001, 9)], torch.get_num_threads()
    found = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found |= {float(sum_of_squares(tensors)) for _ in range(5)}
    torch.set_num_threads(threads)
    assert len(found) == 1
