"""Spatial conditions: masks that belong to the sample, and what is set beside the latent, channel by channel."""

import pytest
import torch

from latentray import randomness
from latentray.conditioning import beside
from latentray.config.beside import BesideConfig
from latentray.errors import ConfigError
from latentray.randomness import Purpose
from latentray.records import SampleId


def keys(count: int, first: int = 0) -> torch.Tensor:
    ids = [SampleId(epoch=0, dataset=0, index=first + i) for i in range(count)]
    return randomness.keys_of(3, Purpose.MASK, ids)


def test_a_mask_belongs_to_its_sample():
    together = beside.masks(keys(6), 24, 40)
    assert together.shape == (6, 1, 24, 40) and set(together.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(together[4:], beside.masks(keys(2, first=4), 24, 40))


def test_masks_cover_something_and_a_quarter_of_them_everything():
    shares = beside.masks(keys(2000), 16, 16).mean((1, 2, 3))
    assert shares.min() > 0
    assert 0.2 < (shares == 1).float().mean() < 0.3
    some = shares[shares < 1]
    assert 0.15 < some.mean() < 0.5 and some.std() > 0.1


def test_even_a_picture_of_one_pixel_has_a_mask():
    assert (beside.masks(keys(50), 1, 1) == 1).all()


def test_inpainting_sets_the_mask_before_the_masked_latent():
    x = torch.rand(2, 3, 8, 8) + 0.5
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, 0, 3, 3] = 1  # one pixel blanks one, and paints the latent pixel that holds it
    seen = []

    def encode(pictures):
        seen.append(pictures)
        return torch.full((2, 4, 4, 4), 7.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beside, "masks", lambda *_: mask)
        made = beside.of_pictures(BesideConfig(kind="inpainting"), x, keys(2), encode, (4, 4))
    assert made.shape == (2, 5, 4, 4) and (made[:, 1:] == 7).all()
    assert made[:, 0].nonzero().tolist() == [[0, 1, 1]]
    assert (seen[0][0, :, 3, 3] == beside.BLANK).all()
    assert torch.equal(torch.where(mask > 0, 0, seen[0]), torch.where(mask > 0, 0, x))


def test_a_small_picture_is_the_mean_of_its_pixels_at_the_latents_resolution():
    x = torch.rand(1, 3, 8, 8)
    config = BesideConfig(kind="super_resolution", factor=2)
    small = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    made = beside.of_pictures(config, x, keys(1), lambda _: x, (4, 4))
    torch.testing.assert_close(made, small)
    assert beside.of_pictures(config, x, keys(1), lambda _: x, (8, 8)).shape == (1, 3, 8, 8)  # in pixel space


def test_nothing_stands_beside_by_default():
    assert beside.of_pictures(BesideConfig(), torch.rand(1, 3, 8, 8), keys(1), lambda x: x, (8, 8)) is None
    assert [BesideConfig(kind=kind).channels(4) for kind in ("none", "inpainting", "super_resolution")] == [0, 5, 3]


@pytest.mark.parametrize(("settings", "where"), [({"kind": "depth"}, "beside.kind"), ({"factor": 1}, "beside.factor")])
def test_bad_settings_are_refused_by_name(settings, where):
    with pytest.raises(ConfigError) as caught:
        BesideConfig(**settings)
    assert caught.value.where == where


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_made_larger_too(dtype):
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    large = beside.super_resolution(x.to(dtype), (8, 8))
    assert large.dtype == dtype
    torch.testing.assert_close(large.float(), beside.super_resolution(x, (8, 8)), atol=0.02, rtol=0)
