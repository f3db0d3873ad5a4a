"""Rows of different solvers in one batch are what each is alone; rows that come and go change no other; starts in the middle."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentray import build, randomness
from latentray.config.denoiser import DenoiserConfig
from latentray.diffusion import guidance, samplers, schedules
from latentray.diffusion.executor import Network, Slots, Table
from latentray.randomness import Purpose

SHAPE = (4, 8, 8)
VP, FLOW, VE = schedules.scaled_linear(1000), schedules.RectifiedFlow(shift=3.0), schedules.VarianceExploding()
ZERO = schedules.zero_terminal_snr(schedules.cosine(1000))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    table: Table
    seed: int
    scale: float

    def begin(self) -> Tensor:
        """Where its table starts: alpha of a clean latent plus sigma of noise."""
        clean, noise = (
            randomness.normal(randomness.keys_from_seeds([self.seed], Purpose.INITIAL_LATENT, counter=k), SHAPE)[0]
            for k in (1, 0)
        )
        return noise if self.table.t[0] >= 999 else self.table.alpha * clean + self.table.sigma * noise


SOLVERS = [
    ("ddpm", VP, "epsilon", {}), ("ddim", VP, "v", {"eta": 0.5}), ("euler", VP, "x0", {}),
    ("euler_ancestral", VE, "edm", {}), ("heun", ZERO, "v", {}), ("dpmpp_2m", VP, "v", {"bound": "clamp"}),
    ("dpmpp_3m", ZERO, "v", {}), ("dpmpp_2m_sde", VP, "v", {}), ("unipc", VP, "v", {"order": 3}),
    ("flow_euler", FLOW, "flow", {}), ("flow_heun", FLOW, "flow", {}),
    ("langevin", VE, "x0", {"inner_steps": 2, "bound": "threshold"}),
]  # fmt: skip


def requests() -> list[Request]:
    """Three of each solver: other step counts, guidance, seeds and starts."""
    made = []
    for k, steps in enumerate((5, 8, 13)):
        for i, (name, schedule, prediction, options) in enumerate(SOLVERS):
            start = (i % 3) * k  # from pure noise, or from 1, 2 or 4 intervals in
            table = samplers.table(name, schedule, prediction, steps, start=start, **options)
            made.append(Request(table=table, seed=100 * k + i, scale=1 + (7 * i + 3 * k) % 13 / 2))
    return made


def elementwise(x: Tensor, t: Tensor, asked: Sequence[Request]) -> Tensor:
    """A network in which no element meets another, guided per row."""
    wide = (-1, 1, 1, 1)
    label = torch.tensor([0.1 * (one.seed % 7) for one in asked], dtype=x.dtype).view(wide)
    scale = torch.tensor([one.scale for one in asked], dtype=x.dtype)
    inner = 1.3 * x + 0.002 * t.to(x.dtype).view(wide)
    return 0.5 * guidance.classifier_free(torch.sin(inner), torch.sin(inner + label), scale)


class Batch:
    """Slots, and who holds them."""

    def __init__(
        self, count: int, dtype: torch.dtype, model: Callable[[Tensor, Tensor, Sequence[Request]], Tensor]
    ) -> None:
        self.slots = Slots(count, SHAPE, dtype=dtype, device="cpu")
        self.holders: dict[int, Request] = {}
        self.model = model

    def admit(self, slot: int, request: Request) -> None:
        self.slots.admit(slot, request.table, request.begin())
        self.holders[slot] = request

    def advance(self, active: Sequence[int]) -> None:
        self.slots.advance(active, self._network, self._noise)

    def finished(self, slot: int) -> bool:
        return self.slots.row(slot) == len(self.holders[slot].table)

    def take(self, slot: int) -> Tensor:
        del self.holders[slot]
        return self.slots.x[slot].clone()

    def _network(self, x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return self.model(x, t, [self.holders[i] for i in rows.tolist()])

    def _noise(self, rows: Sequence[int], row: int) -> Tensor:
        seeds = [self.holders[i].seed for i in rows]
        return randomness.normal(randomness.keys_from_seeds(seeds, Purpose.SAMPLER_NOISE, counter=row), SHAPE)


def alone(request: Request, dtype: torch.dtype, model: Callable[..., Tensor]) -> Tensor:
    batch = Batch(1, dtype, model)
    batch.admit(0, request)
    while not batch.finished(0):
        batch.advance([0])
    return batch.take(0)


def mixed(asked: Sequence[Request], dtype: torch.dtype, model: Callable[..., Tensor]) -> list[Tensor]:
    """All of them through 8 slots: admitted in any order and at any time, in any free slot; any part advances."""
    chance = random.Random(0)
    waiting = list(range(len(asked)))
    chance.shuffle(waiting)
    batch, place, out = Batch(8, dtype, model), dict[int, int](), dict[int, Tensor]()
    together = 0
    while len(out) < len(asked):
        for slot in range(8):
            if slot not in place and waiting and chance.random() < 0.5:
                place[slot] = waiting.pop()
                batch.admit(slot, asked[place[slot]])
        active = [slot for slot in place if chance.random() < 0.8]
        chance.shuffle(active)
        if active:
            batch.advance(active)
        together = max(together, len(active))
        for slot in active:
            if batch.finished(slot):
                out[place.pop(slot)] = batch.take(slot)
    assert together == 8
    return [out[i] for i in range(len(asked))]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def test_a_mixed_batch_equals_its_rows_alone_in_double_precision() -> None:
    asked = requests()
    for request, got in zip(asked, mixed(asked, torch.float64, elementwise), strict=True):
        assert relative(got, alone(request, torch.float64, elementwise)) <= 1e-14


def test_a_mixed_batch_equals_its_rows_alone_bit_for_bit() -> None:
    asked = requests()
    for request, got in zip(asked, mixed(asked, torch.float32, elementwise), strict=True):
        assert torch.isfinite(got).all()
        assert torch.equal(got, alone(request, torch.float32, elementwise))


@torch.inference_mode()
def test_a_mixed_batch_equals_its_rows_alone_with_a_real_network() -> None:
    """Matrix products round otherwise in another batch size, so only to 1e-5.

    A sampler hands such rounding on, at most a few times larger here; not with a clamped epsilon, where 1/alpha enlarges it.
    """
    config = DenoiserConfig(
        channels=[16, 32], blocks=1, depth=[0, 1], heads=None, head_dim=16, context_width=16, groups=8
    )
    net = build.seeded(lambda: build.denoiser(config), 0).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if not parameter.any():  # what starts at zero would hide the rest
            parameter.normal_(std=0.1, generator=generator)

    def unet(x: Tensor, t: Tensor, asked: Sequence[Request]) -> Tensor:
        keys = randomness.keys_from_seeds([one.seed for one in asked], Purpose.CAPTION)
        context = randomness.normal(keys, (5, 16))
        both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([0 * context, context]))
        return guidance.classifier_free(*both.chunk(2), torch.tensor([one.scale for one in asked]))

    asked = requests()
    found = mixed(asked, torch.float32, unet)
    for request, got in zip(asked, found, strict=True):
        assert relative(got, alone(request, torch.float32, unet)) <= 1e-5


def test_a_row_that_joins_or_leaves_changes_no_other_bit() -> None:
    asked = [one for one in requests() if len(one.table) >= 8][:6]

    def run(*, visitors: bool) -> list[Tensor]:
        batch = Batch(8, torch.float32, elementwise)
        stay = range(0, 8, 2)
        for slot in stay:
            batch.admit(slot, asked[slot // 2])
        step = 0
        while any(not batch.finished(slot) for slot in stay):
            active = [slot for slot in stay if not batch.finished(slot)]
            if visitors and step == 2:
                batch.admit(1, asked[4])
                batch.admit(7, dataclasses.replace(asked[5], scale=1e30))  # overflows: infinite, then no number
            active += [slot for slot in (1, 7) if slot in batch.holders and not batch.finished(slot)]
            batch.advance(sorted(active))
            if visitors and step == 5:
                batch.take(1)  # leaves unfinished
            if visitors and step == 6:
                batch.admit(3, asked[4])  # comes back elsewhere
            step += 1
        return [batch.take(slot) for slot in stay]

    for apart, beside in zip(run(visitors=False), run(visitors=True), strict=True):
        assert torch.equal(apart, beside)


# -- no step waits for the device ----------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what would make the host wait: values read, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"):
            self.count += 1
        return func(*args, **(kwargs or {}))


def without_reading(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    return torch.sin(x + t.to(x.dtype).view(-1, 1, 1, 1))


def mixed_slots(device: str, *, bound: str) -> Slots:
    """All solvers at once, at different rows, some with a bound on x_0."""
    tables = [dataclasses.replace(one.table, f=bound if i % 2 else "identity") for i, one in enumerate(requests())]
    slots = Slots(len(tables), SHAPE, dtype=torch.float32, device=device)
    for i, table in enumerate(tables):
        slots.admit(i, table, torch.zeros(SHAPE, device=device))
    return slots


def every_step(slots: Slots, network: Network, device: str) -> None:
    first = True
    while active := slots.unfinished():
        slots.advance(
            active[: 20 if first else None], network, lambda rows, row: torch.ones(len(rows), *SHAPE, device=device)
        )
        first = False


def test_no_value_is_read_within_a_step() -> None:
    """With clamps; a quantile's own check reads on a CPU, and nowhere else: see the next tests for it."""
    slots = mixed_slots("cpu", bound="clamp")
    with Reads() as reads:
        every_step(slots, without_reading, "cpu")
    assert reads.count == 0
    slots = mixed_slots("cpu", bound="clamp")
    with Reads() as reads:  # what a network reads is seen
        slots.advance(
            [0, 1], lambda x, t, rows: x * float(t[0]) if bool(t[0] > 0) else x, lambda rows, row: torch.ones(1)
        )
    assert reads.count == 2


@pytest.mark.parametrize("bound", ["clamp", "threshold"])
def test_a_step_runs_where_there_are_no_values(bound: str) -> None:
    """On the meta device every read and every copy back raises."""
    slots = mixed_slots("meta", bound=bound)
    every_step(slots, without_reading, "meta")
    assert not slots.unfinished()
    with pytest.raises((RuntimeError, NotImplementedError)):
        slots.x.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize("bound", ["clamp", "threshold"])
def test_no_step_synchronises_on_a_gpu(bound: str) -> None:
    slots = mixed_slots("cuda", bound=bound)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        every_step(slots, without_reading, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(slots.x[:8]).all()


# -- starts in the middle ------------------------------------------------------------------------------------------------

WITHOUT_HISTORY = [
    ("ddpm", VP, "v", {}), ("ddim", VP, "epsilon", {"eta": 0.5}), ("euler", VE, "edm", {}), ("euler_ancestral", VE, "x0", {}),
    ("heun", VP, "v", {}), ("flow_euler", FLOW, "flow", {}), ("flow_heun", FLOW, "flow", {}),
    ("langevin", VE, "x0", {"inner_steps": 3}),
]  # fmt: skip
WITH_HISTORY = [
    ("dpmpp_2m", VP, "v", {}, 1), ("dpmpp_3m", VP, "v", {}, 2), ("dpmpp_2m_sde", VP, "v", {}, 1),
    ("unipc", VP, "v", {"order": 2}, 2), ("unipc", VP, "v", {"order": 3}, 3), ("dpmpp_2m", FLOW, "flow", {}, 1),
    ("dpmpp_3m", ZERO, "x0", {}, 2), ("unipc", VE, "edm", {"order": 3}, 3),
]  # fmt: skip


def smooth(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
    return torch.sin(1.3 * x + 0.002 * t.to(x.dtype).view(-1, 1, 1, 1))


def follow(table: Table, x: Tensor, noises: Tensor, network: Network = smooth) -> list[Tensor]:
    """The latent before every row, and at the end."""
    slots = Slots(1, SHAPE, dtype=x.dtype, device="cpu")
    slots.admit(0, table, x)
    seen = [slots.x[0].clone()]
    while slots.unfinished():
        slots.advance([0], network, lambda rows, row: noises[row][None])
        seen.append(slots.x[0].clone())
    return seen


@pytest.mark.parametrize(("name", "schedule", "prediction", "options"), WITHOUT_HISTORY)
@pytest.mark.parametrize(("steps", "start"), [(20, 7), (20, 19), (5, 2)])
def test_a_start_in_the_middle_is_the_full_tables_tail(
    name: str, schedule: schedules.AnySchedule, prediction: str, options: dict, steps: int, start: int
) -> None:
    whole = samplers.table(name, schedule, prediction, steps, **options)
    part = samplers.table(name, schedule, prediction, steps, start=start, **options)
    before = len(whole) - len(part)
    assert before == start * {"heun": 2, "flow_heun": 2, "langevin": 3}.get(name, 1)
    assert torch.equal(part.coefficients, whole.coefficients[before:])
    assert torch.equal(part.t, whole.t[before:])
    alpha, sigma = schedule.alpha_sigma(whole.t[before])
    assert (part.alpha, part.sigma) == pytest.approx((float(alpha), float(sigma)), rel=1e-12)
    noises = torch.randn(len(whole), *SHAPE, generator=torch.Generator().manual_seed(0))
    full = follow(whole, noises[0], noises)
    tail = follow(part, full[before], noises[before:])
    assert all(torch.equal(one, other) for one, other in zip(tail, full[before:], strict=True))


@pytest.mark.parametrize(("name", "schedule", "prediction", "options", "warm_up"), WITH_HISTORY)
@pytest.mark.parametrize(("steps", "start"), [(20, 10), (20, 16), (8, 3)])
def test_with_history_only_the_warm_up_differs(
    name: str, schedule: schedules.AnySchedule, prediction: str, options: dict, warm_up: int, steps: int, start: int
) -> None:
    """The end rules count all steps, not those that are left: 4 of 20 end as the 20 do."""
    whole = samplers.table(name, schedule, prediction, steps, **options).coefficients
    part = samplers.table(name, schedule, prediction, steps, start=start, **options).coefficients
    assert len(part) == steps - start
    assert torch.equal(part[warm_up:], whole[start + warm_up :])
    for k in range(warm_up):
        assert not torch.equal(part[k], whole[start + k])
    assert part[0, 1:4].tolist() == [0, 0, 0]  # there is no history yet
    end_rule = samplers.table(name, schedule, prediction, steps, start=start, lower_order_final=False, **options)
    few_steps = steps < 15 and name != "unipc"
    if few_steps and name == "dpmpp_3m":  # the last row is of first order anyway
        assert not torch.equal(end_rule.coefficients[-2], part[-2])
    if not few_steps and name != "unipc":
        assert torch.equal(end_rule.coefficients, part)


@pytest.mark.parametrize(("name", "schedule", "prediction", "options"), WITHOUT_HISTORY[:-1])
def test_a_stop_and_a_start_make_the_whole(
    name: str, schedule: schedules.AnySchedule, prediction: str, options: dict
) -> None:
    """Base model to refiner: the second goes on where the first stopped."""
    whole = samplers.table(name, schedule, prediction, 10, **options)
    first = samplers.table(name, schedule, prediction, 10, stop=8, **options)
    second = samplers.table(name, schedule, prediction, 10, start=8, **options)
    assert torch.equal(torch.cat([first.t, second.t]), whole.t)
    assert torch.equal(torch.cat([first.coefficients, second.coefficients]), whole.coefficients)
