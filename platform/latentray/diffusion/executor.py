"""Tables of solvers, and the one executor that applies them.

The state of a request is its latent x and three history slots h1, h2, h3. A row of a table is one network call:

    y   = network(x, t)                                   guidance already applied
    m   = f(px x + py y)                                  f: identity, clamp to [-1, 1], or dynamic threshold
    x'  = ax x + am m + ay y + a1 h1 + a2 h2 + a3 h3 + az z       z ~ N(0, I)
    h1' = m;  h2' = h1;  h3' = h2

so one batch can hold requests with different solvers, step counts and guidance. Coefficients are float64; the network sees x
itself, and a start from pure noise is N(0, I). The state's dtype is the caller's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentray.config.bounds import CLAMP, IDENTITY, THRESHOLD

COLUMNS = ("ax", "a1", "a2", "a3", "am", "ay", "az", "px", "py")
_AZ = COLUMNS.index("az")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One request's rows: coefficients (R, 9) float64 in the order of COLUMNS, and timesteps (R,) float64."""

    coefficients: Tensor
    t: Tensor
    alpha: float = 0.0
    sigma: float = 1.0
    """Noise level at which the first row starts: a run that begins in the middle takes alpha x_0 + sigma noise."""
    f: str = IDENTITY
    quantile: float = 0.995
    """Of |m|, for the dynamic threshold."""

    def __len__(self) -> int:
        return len(self.t)


Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B,...), t (B,), rows (B,) int64: which requests these are) -> y (B,...)."""
NoiseSource = Callable[[Sequence[int], int], Tensor]
"""(requests, table row) -> fresh N(0, I) of shape (len(requests), ...)."""


class Slots:
    """The states of up to `slots` requests, each at a row of its own table.

    A request is admitted into a slot, advanced together with any others, and taken out; none sees its neighbours. What a step
    needs lies on the device since admission: a step copies row numbers there and never waits for anything to come back.
    """

    def __init__(self, slots: int, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.x = torch.zeros(slots, *shape, dtype=dtype, device=device)
        self.history = torch.zeros(3, slots, *shape, dtype=dtype, device=device)
        self._tables: list[Table | None] = [None] * slots
        self._rows = [0] * slots
        self._coefficients = torch.zeros(slots, 1, len(COLUMNS), dtype=dtype, device=device)
        self._t = torch.zeros(slots, 1, dtype=torch.float32, device=device)
        self._noisy: list[list[bool]] = [[] for _ in range(slots)]
        self._wide = (-1, *([1] * len(shape)))

    def admit(self, slot: int, table: Table, x: Tensor) -> None:
        """Put a request with the starting latent x into a free slot."""
        room, rows = self._t.shape[1], len(table)
        if rows > room:
            self._coefficients = torch.nn.functional.pad(self._coefficients, (0, 0, 0, rows - room))
            self._t = torch.nn.functional.pad(self._t, (0, rows - room))
        self._coefficients[slot, :rows] = table.coefficients.to(self._coefficients)
        self._t[slot, :rows] = table.t.to(self._t)
        self._tables[slot], self._rows[slot] = table, 0
        self._noisy[slot] = (table.coefficients[:, _AZ] != 0).tolist()
        self.x[slot] = x.to(self.x)
        self.history[:, slot] = 0

    def row(self, slot: int) -> int:
        """The next row of a slot's request; the length of its table where it is finished."""
        return self._rows[slot]

    def unfinished(self) -> list[int]:
        """The slots that still have rows to go."""
        return [i for i, one in enumerate(self._tables) if one is not None and self._rows[i] < len(one)]

    def advance(self, slots: Sequence[int], network: Network, fresh_noise: NoiseSource) -> None:
        """One row of each of these slots, in one network call."""
        rows = [self._rows[i] for i in slots]
        device = self.x.device
        index, row = torch.tensor([list(slots), rows]).to(device, non_blocking=True)
        columns = self._coefficients[index, row]
        ax, a1, a2, a3, am, ay, az, px, py = (c.view(self._wide) for c in columns.unbind(1))
        now, (h1, h2, h3) = self.x[index], self.history[:, index]
        y = network(now, self._t[index, row], index).to(now.dtype)
        m = self._bounded(px * now + py * y, slots)
        after = ax * now + am * m + ay * y + a1 * h1 + a2 * h2 + a3 * h3
        if any(self._noisy[i][r] for i, r in zip(slots, rows, strict=True)):
            after = after + az * self._fresh(slots, rows, fresh_noise, like=now)
        self.x[index] = after
        self.history[:, index] = torch.stack([m, h1, h2])
        for i in slots:
            self._rows[i] += 1

    def _bounded(self, m: Tensor, slots: Sequence[int]) -> Tensor:
        tables = [self._tables[i] for i in slots]
        kinds = [one.f for one in tables if one is not None]
        if all(kind == IDENTITY for kind in kinds):
            return m
        out = m.clone()
        for place, one in enumerate(tables):
            assert one is not None
            if one.f == CLAMP:
                out[place] = m[place].clamp(-1, 1)
            elif one.f == THRESHOLD:
                out[place] = dynamic_threshold(m[place : place + 1], one.quantile)[0]
        return out

    def _fresh(self, slots: Sequence[int], rows: Sequence[int], source: NoiseSource, *, like: Tensor) -> Tensor:
        """Fresh noise, asked for by row: a request's noise belongs to its row, whoever advances with it."""
        noise = torch.zeros_like(like)
        for row in sorted(set(rows)):
            places = [p for p, (i, r) in enumerate(zip(slots, rows, strict=True)) if r == row and self._noisy[i][r]]
            if places:
                drawn = source([slots[p] for p in places], row)
                noise[torch.tensor(places).to(like.device, non_blocking=True)] = drawn.to(like)
        return noise


def dynamic_threshold(m: Tensor, quantile: float) -> Tensor:
    """Clip each sample at its own quantile of |x_0|, never below 1, and divide by it (Saharia et al. 2022, section 2.3)."""
    size = m.flatten(1).abs().float()
    bound = torch.quantile(size, quantile, dim=1).clamp(min=1).to(m.dtype).view(-1, *([1] * (m.ndim - 1)))
    return m.clamp(-bound, bound) / bound


def execute(
    tables: Sequence[Table],
    noise_B: Tensor,
    network: Network,
    fresh_noise: NoiseSource,
    *,
    between: Callable[[Slots], None] | None = None,
) -> Tensor:
    """Run every request's table to its end, in one batch, and return the final latents (B, ...).

    Args:
        tables: one per request; their lengths may differ.
        noise_B: the starting latents, (B, ...), float32 or float64; the state keeps this dtype.
        between: called after every step with the states, before the next row reads them: inpainting writes there.
    """
    slots = Slots(len(tables), noise_B.shape[1:], dtype=noise_B.dtype, device=noise_B.device)
    for i, table in enumerate(tables):
        slots.admit(i, table, noise_B[i])
    while active := slots.unfinished():
        slots.advance(active, network, fresh_noise)
        if between is not None:
            between(slots)
    return slots.x
