"""Our tables walk diffusers' trajectories: its algorithm in float64 to 1e-9, and as it is, in float32, to its own rounding."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from latentray.diffusion import schedules, spacing
from latentray.diffusion.schedules import RectifiedFlow
from latentray.diffusion.solvers import Options
from latentray.errors import ConfigError


def _diffusers64():
    if "diffusers64" not in sys.modules:
        spec = importlib.util.spec_from_file_location("diffusers64", Path(__file__).with_name("diffusers64.py"))
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["diffusers64"]


d64 = _diffusers64()
Cell, Pair = d64.Cell, d64.Pair

FEW, ALL = (5, 15), (5, 14, 15, 30)  # below 15 steps diffusers' multistep solvers end in lower order
ZERO_SNR = ("linear_zsnr", "scaled_linear_zsnr", "cosine_zsnr")
TO_THE_NOISIEST = ("trailing", "linspace")  # leading never visits T - 1


def _multistep(ours: str, order: int, *, eta: float = 0.0, **settings) -> Pair:
    return Pair(
        scheduler=DPMSolverMultistepScheduler,
        ours=ours,
        state=d64.FLOW if "use_flow_sigmas" in settings else d64.PRESERVING,
        settings=dict(solver_order=order) | settings,
        options=Options(eta=eta),
    )


def _unipc(order: int, variant: str, *, corrector: bool = True, **settings) -> Pair:
    # Its bh1 is nan on the way to sigma = 0, -inf * 0, always: there it ends at the schedule's smallest sigma.
    settings.setdefault("final_sigmas_type", "sigma_min" if variant == "bh1" else "zero")
    return Pair(
        scheduler=UniPCMultistepScheduler,
        ours="unipc",
        state=d64.FLOW if "use_flow_sigmas" in settings else d64.PRESERVING,
        settings=dict(solver_order=order, solver_type=variant) | settings,
        options=Options(order=order, variant=variant, corrector=corrector),
        without_corrector=not corrector,
    )


def _ddim(eta: float) -> Pair:
    return Pair(
        scheduler=DDIMScheduler, ours="ddim", state=d64.DISCRETE, settings=dict(clip_sample=False),
        options=Options(eta=eta), step=dict(eta=eta), karras=False,
    )  # fmt: skip


SDE = dict(algorithm_type="sde-dpmsolver++")
PAIRS: dict[str, Pair] = {
    "ddpm": Pair(
        scheduler=DDPMScheduler, ours="ddpm", state=d64.DISCRETE, settings=dict(clip_sample=False), karras=False
    ),
    "ddim": _ddim(0.0),
    "ddim_eta_half": _ddim(0.5),
    "ddim_eta_1": _ddim(1.0),
    "euler": Pair(scheduler=EulerDiscreteScheduler, ours="euler", state=d64.EXPLODING),
    "euler_ancestral": Pair(
        scheduler=EulerAncestralDiscreteScheduler, ours="euler_ancestral", state=d64.EXPLODING, karras=False
    ),
    "heun": Pair(  # which corrects however much sigma shrinks
        scheduler=HeunDiscreteScheduler, ours="heun", state=d64.EXPLODING, options=Options(heun_ratio=math.inf),
        zero_snr=False,
    ),
    "dpmpp_1": _multistep("ddim", 1),
    "dpmpp_2m": _multistep("dpmpp_2m", 2),
    "dpmpp_3m": _multistep("dpmpp_3m_compat", 3),
    "dpmpp_1_sde": _multistep("ddim", 1, eta=1.0, **SDE),
    "dpmpp_2m_sde": _multistep("dpmpp_2m_sde", 2, **SDE),
    "unipc_1": _unipc(1, "bh2"),
    "unipc_2": _unipc(2, "bh2"),
    "unipc_3": _unipc(3, "bh2"),
    "unipc_3_bh1": _unipc(3, "bh1"),
    "unipc_3_uncorrected": _unipc(3, "bh2", corrector=False),
}  # fmt: skip
MORE: dict[str, Pair] = {
    "dpmpp_1_sigma_min": _multistep("ddim", 1, final_sigmas_type="sigma_min"),
    "dpmpp_2m_sigma_min": _multistep("dpmpp_2m", 2, final_sigmas_type="sigma_min"),
    "dpmpp_3m_sigma_min": _multistep("dpmpp_3m_compat", 3, final_sigmas_type="sigma_min"),
    "unipc_1_bh1": _unipc(1, "bh1"),
    "unipc_2_bh1": _unipc(2, "bh1"),
    "unipc_2_sigma_min": _unipc(2, "bh2", final_sigmas_type="sigma_min"),
    "unipc_3_sigma_min": _unipc(3, "bh2", final_sigmas_type="sigma_min"),
    "unipc_1_uncorrected": _unipc(1, "bh2", corrector=False),
    "unipc_2_uncorrected": _unipc(2, "bh2", corrector=False),
    "unipc_1_bh1_uncorrected": _unipc(1, "bh1", corrector=False),
    "unipc_2_bh1_uncorrected": _unipc(2, "bh1", corrector=False),
    "unipc_3_bh1_uncorrected": _unipc(3, "bh1", corrector=False),
}
FLOW: dict[str, Pair] = {
    "flow_euler": Pair(scheduler=FlowMatchEulerDiscreteScheduler, ours="flow_euler", state=d64.FLOW),
    "flow_heun": Pair(scheduler=FlowMatchHeunDiscreteScheduler, ours="flow_heun", state=d64.FLOW, karras=False),
    "flow_dpmpp_1": _multistep("flow_euler", 1, use_flow_sigmas=True),
    "flow_dpmpp_2m": _multistep("dpmpp_2m", 2, use_flow_sigmas=True),
} | {
    f"flow_unipc_{order}_{variant}{'' if corrector else '_uncorrected'}": _unipc(
        order, variant, corrector=corrector, use_flow_sigmas=True
    )
    for order in (1, 2, 3)
    for variant in ("bh1", "bh2")
    for corrector in (True, False)
}

# Where diffusers fails or is not finite, by name.
_NOTHING_OF_X0 = {
    f"{s} epsilon {w} {n}" for s in ZERO_SNR for w in TO_THE_NOISIEST for n in ALL
}  # a division by alpha = 0
_NOT_IMPLEMENTED = {
    f"{s} x0 {w} {n}" for s in d64.SCHEDULES for w in ("leading", "trailing", "linspace") for n in ALL
}  # fmt: skip
_ROOT_OF_LESS_THAN_0 = {  # 1 - abar' - std^2 is 0, and rounds below it
    "scaled_linear_zsnr v trailing 14", "scaled_linear_zsnr v trailing 15", "scaled_linear_zsnr v linspace 14",
    "scaled_linear_zsnr v linspace 15", "scaled_linear_zsnr x0 trailing 14", "scaled_linear_zsnr x0 trailing 15",
    "scaled_linear_zsnr x0 linspace 14", "scaled_linear_zsnr x0 linspace 15", "cosine_zsnr v trailing 5",
    "cosine_zsnr v linspace 5", "cosine_zsnr x0 trailing 5", "cosine_zsnr x0 linspace 5",
}  # fmt: skip
FAILS: dict[str, set[str]] = {
    "ddpm": _NOTHING_OF_X0,
    "ddim": _NOTHING_OF_X0,
    "ddim_eta_half": _NOTHING_OF_X0,
    "ddim_eta_1": _NOTHING_OF_X0 | _ROOT_OF_LESS_THAN_0,
    "euler_ancestral": _NOT_IMPLEMENTED,
}


def bound64(name: str, cell: Cell) -> float:
    """1e-9, and the ill-conditioned cells."""
    if name == "ddim_eta_1" and cell.schedule in ZERO_SNR and cell.spacing in TO_THE_NOISIEST:
        return 1e-7  # the first step's root of 1 - abar' - std^2: 0 for us, that of a rounding error of 1e-16 for diffusers
    if name == "heun" and cell.schedule == "cosine" and cell.prediction == "x0":
        return 1e-8  # sigma falls from 2e4; each corrector multiplies a rounding error by sigma / (2 sigma')
    return 1e-9


def cells(pair: Pair, steps: tuple[int, ...]) -> list[Cell]:
    """Every combination a scheduler has."""
    if pair.state == d64.FLOW:
        spacings = ["trailing"]
        if (
            pair.karras and pair.scheduler is not DPMSolverMultistepScheduler
        ):  # which there takes alpha = 1 - s of s > 1
            spacings.append("karras")
        return [
            Cell(schedule=f"flow{shift}", prediction="flow", spacing=w, steps=n)
            for shift in (1.0, 3.0)
            for w in spacings
            for n in steps
        ]
    return [
        Cell(schedule=s, prediction=p, spacing=w, steps=n)
        for s in d64.SCHEDULES
        if pair.zero_snr or s not in ZERO_SNR
        for p in ("epsilon", "v", "x0")
        for w in ("leading", "trailing", "linspace", *(["karras"] if pair.karras else []))
        for n in steps
    ]


def agrees_in_float64(name: str, pair: Pair, steps: tuple[int, ...]) -> None:
    walks = {cell: d64.follow(pair, cell, wide=True) for cell in cells(pair, steps)}
    fails = {cell for cell, walk in walks.items() if not walk.finished}
    assert {str(cell) for cell in fails} == {one for one in FAILS.get(name, ()) if int(one.split()[-1]) in steps}
    for cell in [one for one in fails if one.prediction == "epsilon"]:
        with pytest.raises(ConfigError, match="where alpha is 0"):
            d64.table(pair, cell, walks[cell].grids)
    finite = [cell for cell in walks if cell not in fails or cell.prediction != "epsilon"]
    got = dict(zip(finite, d64.ours([d64.table(pair, c, walks[c].grids) for c in finite]), strict=True))
    assert all(bool(torch.isfinite(one).all()) for one in got.values())
    far = {cell: d64.distance(got[cell], walks[cell].states) for cell in finite if cell not in fails}
    assert not {str(cell): error for cell, error in far.items() if error > bound64(name, cell)}


@pytest.mark.parametrize("name", PAIRS)
def test_each_step_is_diffusers_own_in_float64(name):
    agrees_in_float64(name, PAIRS[name], FEW)


@pytest.mark.parametrize("name", FLOW)
def test_each_step_of_rectified_flow_is_diffusers_own_in_float64(name):
    agrees_in_float64(name, FLOW[name], ALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS | MORE)
def test_each_step_is_diffusers_own_in_float64_with_every_variant(name):
    agrees_in_float64(name, (PAIRS | MORE)[name], ALL)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_bh1_reaches_clean_data_where_diffusers_is_not_finite(order):
    pair = _unipc(order, "bh1", final_sigmas_type="zero")
    cell = Cell(schedule="linear", prediction="v", spacing="trailing", steps=5)
    theirs = d64.follow(pair, cell, wide=True)
    (got,) = d64.ours([d64.table(pair, cell, theirs.grids)])
    assert bool(torch.isnan(theirs.states[-1]).all())
    assert bool(torch.isfinite(got).all())
    assert d64.distance(got[:-1], theirs.states[:-1]) <= 1e-9


# Stock diffusers, float32, against our float64 rows: columns are linear and scaled_linear, cosine (with or without zero
# terminal SNR), zero terminal SNR of the other two, and the same three with Karras sigmas. 2e-5 is what is asked; the rest is
# diffusers' own float32, for three reasons:
#   levels     alphas_cumprod, multiplied up in float32, is off by 1e-5 where it is small: so are sigma and, with Karras sigmas,
#              all levels; a step from cosine's or zero SNR's largest sigma sees it most.
#   timesteps  Karras: its log-sigma interpolation picks others, by up to 1 (cosine) or 4 (zero SNR): another network input.
#   state      Euler's and Heun's is x / alpha: at sigma 2e4 (cosine) or 4e3 (zero SNR) its rounding alone is 1e-3, and a Heun
#              corrector multiplies it by sigma / (2 sigma').
# So the x0-form solvers must be within 2e-5 on every schedule where our rows are built over its own float32 levels and
# timesteps; only Karras' smallest steps at cosine's and zero SNR's largest sigma, differences of nearly equal levels, are not.
STOCK: dict[str, tuple[float, ...]] = {
    "ddpm": (2e-5, 5e-5, 2e-5),
    "ddim": (2e-5, 6e-5, 3e-5),
    "ddim_eta_half": (2e-5, 6e-5, 3e-5),
    "ddim_eta_1": (2e-5, 1e-3, 1e-3),  # the root of 1 - abar' - std^2, 0 but for a rounding error of 1e-7
    "euler": (2e-5, 8e-4, 7e-5, 6e-4, 2e-3, 1e-1),
    "euler_ancestral": (2e-5, 1e-3, 1e-4),
    "heun": (1e-3, 4e-1, math.nan, 6e-3, 2e-2, math.nan),
    "dpmpp_1": (2e-5, 2e-5, 1e-5, 1e-4, 4e-1, 2e-1),
    "dpmpp_2m": (2e-5, 2e-5, 1e-5, 1e-4, 4e-1, 2e-1),
    "dpmpp_3m": (2e-5, 2e-5, 1e-5, 1e-4, 4e-1, 2e-1),
    "dpmpp_1_sde": (2e-5, 5e-5, 2e-5, 3e-4, 2e-1, 1e-1),
    "dpmpp_2m_sde": (2e-5, 5e-5, 2e-5, 3e-4, 2e-1, 1e-1),
    "unipc_1": (2e-5, 5e-5, 6e-5, 1e-4, 1e-2, 1e-1),
    "unipc_2": (2e-5, 5e-5, 6e-5, 1e-4, 1e-2, 1e-1),
    "unipc_3": (2e-5, 5e-5, 6e-5, 1e-4, 1e-2, 1e-1),
    "unipc_3_bh1": (2e-5, 1e-4, 6e-5, 3e-4, 1e-2, 1e-1),
    "unipc_3_uncorrected": (2e-5, 5e-5, 6e-5, 1e-4, 1e-2, 1e-1),
}
STATE_OR_ROOT = ("euler", "euler_ancestral", "heun", "ddim_eta_1")


def bound32(name: str, cell: Cell) -> float:
    column = 1 if cell.schedule.startswith("cosine") else 2 if cell.schedule in ZERO_SNR else 0
    return STOCK[name][column + (3 if cell.spacing == "karras" else 0)]


def agrees_with_stock(name: str, steps: tuple[int, ...]) -> None:
    pair = PAIRS[name]
    stock = {cell: d64.follow(pair, cell, wide=False) for cell in cells(pair, steps)}
    finite = [cell for cell, walk in stock.items() if walk.finished]
    assert len(finite) > len(stock) / 2  # which ones fail is the float64 tests' matter
    exact = d64.ours([d64.table(pair, cell, d64.levels(pair, cell)) for cell in finite])
    far = {cell: d64.distance(one, stock[cell].states) for cell, one in zip(finite, exact, strict=True)}
    assert not {str(cell): error for cell, error in far.items() if error > bound32(name, cell)}
    if name not in STATE_OR_ROOT:
        at_its_own = d64.ours([d64.table(pair, cell, stock[cell].grids) for cell in finite])
        far = {cell: d64.distance(one, stock[cell].states) for cell, one in zip(finite, at_its_own, strict=True)}
        assert not {
            str(cell): error
            for cell, error in far.items()
            if error > 2e-5 and (cell.spacing != "karras" or cell.schedule in ("linear", "scaled_linear"))
        }


@pytest.mark.parametrize("name", STOCK)
def test_stock_diffusers_is_as_near_as_its_float32_lets_it(name):
    agrees_with_stock(name, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_diffusers_is_as_near_as_its_float32_lets_it_at_any_number_of_steps(name):
    agrees_with_stock(name, ALL)


@pytest.mark.parametrize("name", FLOW)
def test_stock_diffusers_is_near_in_rectified_flow(name):
    pair = FLOW[name]
    stock = {cell: d64.follow(pair, cell, wide=False) for cell in cells(pair, ALL) if cell.spacing == "trailing"}
    # UniPC starts at s = 1 - 1e-6, and float32 keeps one digit of 1 - s: its levels are taken as they are.
    grids = [walk.grids if "unipc" in name else d64.levels(pair, cell) for cell, walk in stock.items()]
    got = d64.ours([d64.table(pair, cell, one) for cell, one in zip(stock, grids, strict=True)])
    far = [d64.distance(one, walk.states) for one, walk in zip(got, stock.values(), strict=True)]
    assert max(far) <= 5e-6


VP = schedules.scaled_linear(1000)
SD = d64.SCHEDULES["scaled_linear"]


@pytest.mark.parametrize(
    ("name", "offset", "steps"),
    [
        # Past 47, T (N - i) / N may be half an integer: numpy's arange rounds its own error there. At 61, 103 and more,
        # arange has one point too many, and diffusers' last timestep is -1.
        ("trailing", 0, [*range(1, 48), 50, 64, 100, 125, 200, 250, 500, 1000]),
        ("linspace", 0, [*range(2, 103), 150, 200, 250, 500, 1000]),  # one point of linspace(0, T - 1) is 0
        ("leading", 1, range(1, 1000)),
    ],
)
def test_spacings_are_diffusers_own(name, offset, steps):
    theirs = DDIMScheduler(**SD, timestep_spacing=name, steps_offset=offset)
    for n in steps:
        theirs.set_timesteps(n)
        assert spacing.grid(VP, n, name).t.tolist() == theirs.timesteps.tolist(), n


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "stock"])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_karras_levels_are_diffusers_own(steps, wide):
    cell = Cell(schedule="scaled_linear", prediction="epsilon", spacing="karras", steps=steps)
    pair = PAIRS["euler"]
    (theirs,) = d64.levels(pair, cell) if wide else d64.follow(pair, cell, wide=False).grids
    grid = spacing.grid(VP, steps, "karras")
    # In float32, 1 - abar keeps four digits near the data, and log-sigma is interpolated from there.
    near, timestep = (1e-12, 1e-7) if wide else (1e-5, 1e-2)
    torch.testing.assert_close(grid.alpha, theirs.alpha, rtol=near, atol=near / 10)
    torch.testing.assert_close(grid.sigma, theirs.sigma, rtol=near, atol=near / 10)
    torch.testing.assert_close(grid.t, theirs.t, rtol=0, atol=timestep)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5, 28, 50])
def test_flow_levels_are_those_of_the_pipelines(steps, shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(
        sigmas=torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
    )  # as FLUX's gives them
    grid = spacing.grid(RectifiedFlow(shift=shift), steps, "trailing")
    torch.testing.assert_close(grid.sigma.float(), theirs.sigmas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grid.t.float(), theirs.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("steps", [2, 5, 50])
def test_flow_linspace_is_the_schedulers_default(steps):
    theirs = FlowMatchEulerDiscreteScheduler()  # with a shift, it shifts its smallest sigma twice
    theirs.set_timesteps(steps)
    grid = spacing.grid(RectifiedFlow(), steps, "linspace")
    torch.testing.assert_close(grid.sigma.float(), theirs.sigmas, rtol=1e-6, atol=1e-7)
