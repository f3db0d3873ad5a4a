"""What holds for all inputs: conversions, weights, schedules, draws; and bad input, refused by its field before any step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from latentray import randomness
from latentray.config.objective import ObjectiveConfig
from latentray.diffusion import guidance, losses, parameterization, samplers, schedules, spacing, timesteps
from latentray.errors import ConfigError
from latentray.randomness import Purpose

many = settings(max_examples=60, deadline=None, derandomize=True)
numbers = st.floats(-5, 5, allow_subnormal=False)
BASES = {"linear": schedules.linear, "scaled_linear": schedules.scaled_linear, "cosine": schedules.cosine}


def double(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# -- predictions ---------------------------------------------------------------------------------------------------------


def converted(prediction: str, to: str, y: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of another prediction would have said: by way of x_0 and the noise."""
    c = parameterization.coefficients(prediction, alpha, sigma)
    return parameterization.target(to, c.x0_x * x + c.x0_y * y, c.noise_x * x + c.noise_y * y, alpha, sigma)


@many
@given(
    st.sampled_from(["epsilon", "x0", "v", "edm"]), st.sampled_from(["epsilon", "x0", "v", "edm"]),
    st.floats(0.01, 0.99), numbers, numbers,
)  # fmt: skip
def test_converting_there_and_back_is_the_identity(one: str, other: str, level: float, y: float, x: float) -> None:
    sigma = double(level)
    alpha = (1 - sigma.square()).sqrt()
    there = converted(one, other, double(y), double(x), alpha, sigma)
    back = converted(other, one, there, double(x), alpha, sigma)
    torch.testing.assert_close(back, double(y), rtol=1e-9, atol=1e-9)


@many
@given(
    st.sampled_from(["epsilon", "x0", "flow"]), st.sampled_from(["epsilon", "x0", "flow"]),
    st.floats(0.01, 0.99), numbers, numbers,
)  # fmt: skip
def test_so_it_is_on_straight_paths(one: str, other: str, level: float, y: float, x: float) -> None:
    sigma = double(level)
    there = converted(one, other, double(y), double(x), 1 - sigma, sigma)
    back = converted(other, one, there, double(x), 1 - sigma, sigma)
    torch.testing.assert_close(back, double(y), rtol=1e-9, atol=1e-9)


@many
@given(st.floats(1e-3, 100), st.floats(0.1, 3), numbers, numbers)
def test_edm_is_table_1_of_karras(s: float, spread: float, z: float, y: float) -> None:
    """D(z; s) = c_skip z + c_out F(c_in z; c_noise), and both what F sees and what it is to say have variance 1."""
    total = s**2 + spread**2
    c_skip, c_out, c_in = spread**2 / total, s * spread / math.sqrt(total), 1 / math.sqrt(total)
    schedule = schedules.VarianceExploding(sigma_data=spread)
    t = schedule.time_of(double(s))
    assert float(t) == pytest.approx(1000 * math.log(s) / 4, rel=1e-12, abs=1e-9)
    alpha, sigma = schedule.alpha_sigma(t)
    assert float(alpha) == pytest.approx(c_in, rel=1e-12)
    c = parameterization.coefficients("edm", alpha, sigma)
    x = c_in * z
    assert float(c.x0_x * x + c.x0_y * y) == pytest.approx(c_skip * z + c_out * y, rel=1e-7, abs=1e-7)
    of_x0 = parameterization.target("edm", double(1.0), double(0.0), alpha, sigma)
    of_noise = parameterization.target("edm", double(0.0), double(1.0), alpha, sigma)
    assert float(of_x0) == pytest.approx((1 - c_skip) / c_out, rel=1e-7)  # F = (x_0 - c_skip z) / c_out
    assert float(of_noise) == pytest.approx(-c_skip * s / c_out, rel=1e-7)
    assert float((of_x0 * spread).square() + of_noise.square()) == pytest.approx(1, rel=1e-7)
    assert float((alpha * spread).square() + sigma.square()) == pytest.approx(1, rel=1e-12)


# -- weights -------------------------------------------------------------------------------------------------------------


@many
@given(
    st.sampled_from(["min_snr", "soft_min_snr"]), st.sampled_from(list(BASES)), st.booleans(),
    st.integers(0, 999), st.floats(0.5, 20), numbers, numbers, numbers,
)  # fmt: skip
def test_the_weighted_losses_of_all_predictions_agree(
    weighting: str, base: str, zero: bool, t: int, gamma: float, x0: float, noise: float, guess: float
) -> None:
    """The same guess of x_0, said in each prediction's terms, costs the same."""
    assume(abs(guess - x0) > 1e-3)
    found = []
    for prediction in ("v", "x0") if zero else ("epsilon", "v", "x0"):
        config = ObjectiveConfig(
            schedule=base, zero_terminal_snr=zero, prediction=prediction, weighting=weighting, min_snr_gamma=gamma
        )
        alpha, sigma = schedules.build(config).alpha_sigma(torch.tensor([t]))
        x = alpha * x0 + sigma * noise
        guessed, target = (
            parameterization.target(prediction, double([value]), (x - alpha * value) / sigma, alpha, sigma)
            for value in (guess, x0)
        )
        found.append(float(timesteps.weights(config, alpha, sigma) * (guessed - target).square()))
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5, abs=1e-12)


@many
@given(st.sampled_from(["epsilon", "v", "x0"]), st.sampled_from(list(BASES)), st.integers(0, 999), st.floats(0.5, 20))
def test_min_snr_is_the_published_formula(prediction: str, base: str, t: int, gamma: float) -> None:
    """Hang et al. 2023, section 3.4; and the smooth form, the harmonic sum of SNR and gamma (Crowson et al. 2024)."""
    abar = float(BASES[base](1000).alphas_cumprod[t])
    snr = abar / (1 - abar)
    hard = {"x0": min(snr, gamma), "epsilon": min(gamma / snr, 1.0), "v": min(snr, gamma) / (snr + 1)}
    soft = 1 / (1 / snr + 1 / gamma)
    smooth = {"x0": soft, "epsilon": soft / snr, "v": soft / (snr + 1)}
    for weighting, expected in (("min_snr", hard), ("soft_min_snr", smooth)):
        config = ObjectiveConfig(schedule=base, prediction=prediction, weighting=weighting, min_snr_gamma=gamma)
        alpha, sigma = schedules.build(config).alpha_sigma(torch.tensor([t]))
        assert float(timesteps.weights(config, alpha, sigma)) == pytest.approx(expected[prediction], rel=1e-6)


# -- zero terminal SNR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("count", [2, 10, 1000])
def test_zero_terminal_snr_is_exact_and_finite_everywhere(base: str, count: int) -> None:
    plain = BASES[base](count)
    schedule = schedules.zero_terminal_snr(plain)
    whole = torch.arange(count)
    alpha, sigma = schedule.alpha_sigma(whole)
    assert float(alpha[-1]) == 0 and float(sigma[-1]) == 1
    assert float(alpha[0]) == pytest.approx(float(plain.alpha_sigma(whole)[0][0]), rel=1e-12)  # the clean end stays
    assert (alpha.diff() < 0).all()
    torch.testing.assert_close(torch.stack(schedule.alpha_sigma(whole.double())), torch.stack([alpha, sigma]))
    between = torch.stack(schedule.alpha_sigma(torch.linspace(0, count - 1, 501, dtype=torch.float64)))
    assert torch.isfinite(between).all()
    x0, noise = torch.randn(2, count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for prediction in ("v", "x0"):
        for weighting in ("none", "min_snr", "soft_min_snr"):
            config = ObjectiveConfig(prediction=prediction, weighting=weighting, timesteps=count)
            batch = losses.noised(config, schedule, x0, noise, whole)
            assert torch.isfinite(losses.mean_squared(torch.zeros_like(x0), batch)).all()


@pytest.mark.parametrize("base", BASES)
def test_every_solver_passes_through_zero_terminal_snr(base: str) -> None:
    schedule = schedules.zero_terminal_snr(BASES[base](1000))
    for name in samplers.names(schedule):
        for chosen in ("trailing", "linspace", "leading"):
            for prediction in ("v", "x0"):
                table = samplers.table(name, schedule, prediction, 7, spacing_name=chosen)
                assert torch.isfinite(table.coefficients).all(), (name, chosen)
        with pytest.raises(ConfigError) as caught:
            samplers.table(name, schedule, "epsilon", 7)
        assert caught.value.where == "prediction"
    with pytest.raises(ConfigError) as caught:
        spacing.grid(schedule, 7, "karras")
    assert caught.value.where == "spacing"


# -- timestep draws ------------------------------------------------------------------------------------------------------

N = 4000
EVEN = (torch.arange(N, dtype=torch.float64) + 0.5) / N


def distance(cdf: Tensor) -> float:
    """Kolmogorov and Smirnov's: the CDF at the draws, in order, against the uniform one."""
    return float((cdf.sort().values - EVEN).abs().max()) + 0.5 / N


def flow_draw(draw: str, u: Tensor = EVEN, **values: float) -> Tensor:
    """Draws of t/T in [0, 1] with the shift undone."""
    config = ObjectiveConfig(schedule="flow", prediction="flow", timestep_draw=draw, **values)
    schedule = schedules.build(config)
    assert isinstance(schedule, schedules.RectifiedFlow)
    s = timesteps.from_uniform(config, schedule, u) / 1000
    return s / (schedule.shift - (schedule.shift - 1) * s)


@many
@given(st.floats(-2, 2), st.floats(0.3, 2), st.floats(0.5, 6))
def test_logit_normal_draws_have_their_density(mean: float, std: float, shift: float) -> None:
    s = flow_draw("logit_normal", draw_mean=mean, draw_std=std, shift=shift)
    assert distance(torch.special.ndtr((torch.logit(s) - mean) / std)) <= 1 / N


def mode_cdf(s: Tensor, scale: float) -> Tensor:
    """P(t <= s), by bisection for the u with f(u) = s: f of equation 20 falls from 1 to 0 (Esser et al. 2024)."""
    low, high = torch.zeros_like(s), torch.ones_like(s)
    for _ in range(60):
        u = (low + high) / 2
        above = 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u) > s
        low, high = torch.where(above, u, low), torch.where(above, high, u)
    return 1 - low


@many
@given(st.floats(-1, 2 / (math.pi - 2)), st.floats(0.5, 6))
def test_mode_draws_have_their_density(scale: float, shift: float) -> None:
    assert distance(mode_cdf(flow_draw("mode", mode_scale=scale, shift=shift), scale)) <= 1 / N


@many
@given(st.floats(-2, 1), st.floats(0.3, 1.4))
def test_log_normal_draws_have_their_density(mean: float, std: float) -> None:
    config = ObjectiveConfig(
        schedule="ve", prediction="edm", timestep_draw="log_normal", draw_mean=mean, draw_std=std, sigma_min=1e-4,
        sigma_max=1000.0,
    )  # fmt: skip
    t = timesteps.from_uniform(config, schedules.build(config), EVEN)
    assert distance(torch.special.ndtr((t / 250 - mean) / std)) <= 1 / N


@pytest.mark.parametrize("draw", ["uniform", "logit_normal", "mode"])
def test_seeded_draws_pass_a_kolmogorov_smirnov_test(draw: str) -> None:
    u = randomness.uniform(randomness.keys_from_seeds(range(N), Purpose.TIMESTEP)).flatten()
    s = flow_draw(draw, u)
    cdf = {"uniform": s, "logit_normal": torch.special.ndtr(torch.logit(s)), "mode": mode_cdf(s, 1.29)}[draw]
    assert stats.kstest(cdf.numpy(), "uniform").pvalue > 0.01


def spread(kind: str, slots: Tensor, batch: int, shift: float) -> Tensor:
    """The draws of some samples of a global batch; each sample's own number comes from its position."""
    u = randomness.uniform(randomness.keys_from_seeds(slots.tolist(), Purpose.TIMESTEP)).flatten()
    return timesteps.spread_over_batch(ObjectiveConfig(timestep_spread=kind), u, slots, shift, batch)


@many
@given(st.sampled_from(["none", "stratified", "sobol"]), st.integers(1, 8), st.integers(1, 12), st.floats(0, 0.999))
def test_spread_draws_do_not_depend_on_the_world_size(kind: str, world: int, share: int, shift: float) -> None:
    slots = torch.arange(world * share)
    whole = spread(kind, slots, world * share, shift)
    parts = torch.cat([spread(kind, slots[rank::world], world * share, shift) for rank in range(world)])
    assert torch.equal(parts.view(world, share).T.flatten(), whole)
    assert float(whole.min()) >= 0 and float(whole.max()) < 1


@many
@given(st.integers(1, 300), st.floats(0, 0.999))
def test_spread_draws_cover_the_unit_interval(batch: int, shift: float) -> None:
    slots = torch.arange(batch)
    each = (spread("stratified", slots, batch, shift) * batch).floor()
    assert torch.equal(each, slots.double())
    sobol = spread("sobol", slots, batch, shift).sort().values
    around = torch.cat([sobol, sobol[:1] + 1]).diff()  # the interval is a circle to a rotation
    powers = 2 ** math.floor(math.log2(batch)), 2 ** math.ceil(math.log2(batch))
    assert float(around.max()) <= 1 / powers[0] + 1e-12
    assert float(around.min()) >= 1 / powers[1] - 1e-12


# -- guidance ------------------------------------------------------------------------------------------------------------

latents = st.lists(numbers, min_size=4, max_size=4).map(lambda v: double(v).view(1, 2, 2))


@many
@given(latents, latents, st.floats(0, 1), st.floats(0, 20))
def test_guidance_at_its_neutral_values(u: Tensor, c: Tensor, share: float, scale: float) -> None:
    torch.testing.assert_close(guidance.classifier_free(u, c, double([1.0])), c, rtol=0, atol=1e-14)
    guided = guidance.classifier_free(u, c, double([scale]))
    assert torch.equal(guidance.rescale(guided, c, double([0.0])), guided)
    assume(float(guided.std()) > 1e-3)
    out = guidance.rescale(guided, c, double([share]))
    between = share * c.std() + (1 - share) * guided.std()
    torch.testing.assert_close(out.std(), between, rtol=1e-9, atol=1e-9)


# -- bad input -----------------------------------------------------------------------------------------------------------

VP, FLOW, VE = schedules.scaled_linear(1000), schedules.RectifiedFlow(), schedules.VarianceExploding()


def never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the network was called")


def refused(where: str, schedule: object = VP, prediction: str = "v", sampler: str = "ddim", **settings: object) -> str:
    """That `sample` and `table` refuse, naming the field, before the first step; the mend."""
    steps = settings.pop("steps", 10)
    with pytest.raises(ValueError) as caught:
        samplers.sample(never, torch.zeros(2, 1, 4, 4), schedule, sampler, steps, prediction=prediction, **settings)
    with pytest.raises(ConfigError) as again:
        samplers.table(sampler, schedule, prediction, steps, **settings)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.where == again.value.where == where
    return caught.value.mend


@many
@given(st.text(max_size=12))
def test_an_unknown_sampler_is_refused_and_the_known_ones_are_listed(name: str) -> None:
    for schedule, prediction in ((VP, "v"), (FLOW, "flow"), (VE, "edm")):
        assume(name not in samplers.names(schedule))
        mend = refused("sampler", schedule, prediction, name)
        assert all(known in mend for known in samplers.names(schedule))


@pytest.mark.parametrize("schedule", ["cosine", None, object()])
def test_what_is_no_schedule_is_refused(schedule: object) -> None:
    assert "cosine" in refused("schedule", schedule)


def test_an_unknown_schedule_name_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        ObjectiveConfig(schedule="cosnie")
    assert caught.value.where == "objective.schedule"
    assert "scaled_linear" in caught.value.mend


@many
@given(
    st.one_of(st.integers(max_value=0), st.integers(min_value=1001), st.floats(), st.booleans(), st.none(), st.text())
)
def test_steps_out_of_range_are_refused(steps: object) -> None:
    for schedule, prediction, sampler in ((VP, "v", "ddim"), (FLOW, "flow", "flow_heun"), (VE, "edm", "heun")):
        refused("steps", schedule, prediction, sampler, steps=steps)


@pytest.mark.parametrize(
    ("schedule", "prediction", "sampler"),
    [
        (FLOW, "epsilon", "flow_euler"), (FLOW, "v", "dpmpp_2m"), (FLOW, "x0", "unipc"), (VP, "flow", "ddim"),
        (VP, "edm", "ddim"), (VE, "v", "euler"), (VE, "flow", "heun"), (VP, "nonsense", "ddim"),
        (schedules.zero_terminal_snr(VP), "epsilon", "ddim"),
    ],
)  # fmt: skip
def test_a_prediction_that_does_not_fit_is_refused(schedule: object, prediction: str, sampler: str) -> None:
    refused("prediction", schedule, prediction, sampler)


@many
@given(st.one_of(st.floats(max_value=0, exclude_max=True), st.floats(min_value=1, exclude_min=True), st.just(math.nan)))
def test_eta_outside_its_range_is_refused(eta: float) -> None:
    refused("eta", eta=eta)


@many
@given(st.one_of(st.floats(max_value=0, exclude_max=True), st.sampled_from([math.nan, math.inf])))
def test_guidance_that_is_negative_or_no_number_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError) as caught:
        guidance.check(scale)
    assert caught.value.where == "guidance_scale"


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        ("order", {"order": 4}), ("variant", {"variant": "bh3"}), ("inner_steps", {"inner_steps": 0}),
        ("step_size", {"step_size": 1.0}), ("heun_ratio", {"heun_ratio": 1.0}), ("bound", {"bound": "fold"}),
        ("quantile", {"quantile": 0.0}), ("start", {"start": 10}), ("start", {"start": 4, "stop": 4}),
        ("start", {"start": -1}), ("start", {"stop": 11}), ("spacing", {"spacing_name": "sqrt"}), ("etta", {"etta": 0.5}),
    ],
)  # fmt: skip
def test_every_other_setting_is_refused_by_its_name(where: str, settings: dict) -> None:
    refused(where, **settings)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_noise_that_is_not_finite_is_refused(bad: float) -> None:
    noise = torch.zeros(2, 1, 4, 4)
    noise[1, 0, 2, 2] = bad
    with pytest.raises(ConfigError) as caught:
        samplers.sample(never, noise, VP, "ddim", 10)
    assert caught.value.where == "noise"


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.5, math.nan])
def test_strength_outside_its_range_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError) as caught:
        samplers.start_of(strength, 20)
    assert caught.value.where == "strength"
