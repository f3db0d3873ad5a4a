"""The quantiser: truly the nearest vectors, in any precision, at any size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.models import quantizer
from latentray.models.quantizer import Quantizer


def filled(codes: int, width: int, seed: int = 0) -> Quantizer:
    made = Quantizer(codes, width)
    made.codebook_KD.normal_(generator=torch.Generator().manual_seed(seed))
    return made


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5))
def test_every_pixel_gets_its_nearest_vector(codes, width, batch, height, across):
    made = filled(codes, width)
    z = torch.randn(batch, width, height, across)
    distances = (z[:, None].double() - made.codebook_KD.double()[None, :, :, None, None]).square().sum(2)
    found = made.nearest(z)
    assert found.shape == (batch, 1, height, across)
    at = distances.gather(1, found)[:, 0]
    torch.testing.assert_close(at, distances.amin(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made(z), made.codebook_KD[found[:, 0]].movedim(-1, 1))


def test_many_pixels_are_searched_in_parts(monkeypatch):
    made, z = filled(16, 3), torch.randn(2, 3, 9, 7)
    whole = made.nearest(z)
    monkeypatch.setattr(quantizer, "_AT_ONCE", 16 * 5)
    assert torch.equal(made.nearest(z), whole)


def test_the_first_of_equal_vectors_is_taken():
    made = Quantizer(4, 2)
    made.codebook_KD.copy_(torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [0.0, 9.0]]))
    assert (made.nearest(torch.ones(1, 2, 3, 3)) == 1).all()


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.half().float()])
def test_the_codebook_keeps_its_precision_when_the_network_is_rounded(move):
    made = torch.nn.Sequential(filled(8, 2), torch.nn.Linear(2, 2))
    before = made[0].codebook_KD.clone()
    move(made)
    assert torch.equal(made[0].codebook_KD, before)
    z = torch.randn(1, 2, 4, 4)
    assert torch.equal(made[0].nearest(z.bfloat16()), made[0].nearest(z.bfloat16().float()))
    assert made[0](z.bfloat16()).dtype == torch.bfloat16


def test_autocast_does_not_round_the_search():
    made, z = filled(300, 8), torch.randn(1, 8, 12, 12)
    expected = made.nearest(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.nearest(z), expected)
