"""The measurements of the four known failures, on pictures and laws where the answer is known."""

import numpy as np
import pytest
import torch

from latentray.data import synthetic
from latentray.diffusion import schedules
from latentray.evaluation import failures

LAW = dict(mean=0.3, spread=0.5)
SCALED = schedules.scaled_linear(1000)


@pytest.mark.parametrize("pixels", [64, 4096])
@pytest.mark.parametrize("base", [schedules.linear, schedules.scaled_linear, schedules.cosine])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_sampled_brightness_has_the_analytic_law(base, zero_snr, pixels):
    schedule = base(1000)
    schedule = schedules.zero_terminal_snr(schedule) if zero_snr else schedule
    wanted = failures.contrast_in_closed_form(schedule, **LAW, pixels=pixels)
    got = failures.contrast_measured(schedule, **LAW, pixels=pixels, sampler="unipc")
    assert got.spread == pytest.approx(wanted.spread, rel=2e-4)
    assert got.mean == pytest.approx(wanted.mean, abs=1e-5)


def test_contrast_is_muted_without_zero_terminal_snr_only():
    muted = failures.contrast_in_closed_form(SCALED, **LAW, pixels=4096)
    healed = failures.contrast_in_closed_form(schedules.zero_terminal_snr(SCALED), **LAW, pixels=4096)
    alpha, sigma = (float(v) for v in SCALED.alpha_sigma(torch.tensor(999)))
    assert muted.spread == pytest.approx(
        0.5 / (4096 * (alpha * 0.5) ** 2 + sigma**2) ** 0.5
    )  # the paper's effect, by hand
    assert muted.spread < 0.25 and muted.mean < 0.1
    assert healed.spread == pytest.approx(0.5, rel=2e-3) and healed.mean == pytest.approx(0.3, abs=1e-12)


def test_leading_spacing_mutes_even_a_healed_schedule():
    healed = schedules.zero_terminal_snr(SCALED)
    trailing, leading = (
        failures.contrast_measured(healed, **LAW, pixels=4096, steps=20, spacing=s) for s in ("trailing", "leading")
    )
    assert trailing.mean == pytest.approx(0.3) and leading.mean < 0.2  # it starts below the noise it was healed for


def test_saturation_counts_channel_values():
    pictures = np.full((2, 4, 4, 3), 128, np.uint8)
    assert failures.saturated_share(pictures) == 0
    pictures[0, :, :, 0] = 255
    pictures[1, 0, 0, 1] = 1
    assert failures.saturated_share(pictures) == pytest.approx(17 / 96)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_drawn_picture_has_one_object(split):
    drawn = np.stack([synthetic.draw(synthetic.kind_of(split, i), 0, i, split=split) for i in range(108)])
    assert failures.repeated_share(drawn) == 0


def test_two_shapes_side_by_side_are_two_objects():
    kind = synthetic.KINDS[0]
    one, other = (synthetic.draw(kind, 0, i) for i in range(2))
    assert failures.objects(np.concatenate([one, other], axis=1)) == 2
    assert failures.objects(np.full((64, 64, 3), 245, np.uint8)) == 0
    assert failures.repeated_share(np.stack([np.full((64, 64, 3), 245, np.uint8), one])) == 0.5
