"""The EMA: the half-life in samples, the early cap, and weights that come back after an export."""

import pytest
import torch

from latentray.training.ema import EMA


class OneWeight:
    """An engine of a single fp32 partition."""

    def __init__(self, value: float) -> None:
        self.weight = torch.full((3,), value)

    def master_partitions(self):
        return [self.weight]

    def copy_of(self, tensor):
        return tensor.clone()

    def full_state(self):
        return {"weight": self.weight.clone()}


def test_it_moves_by_the_formula_and_is_not_the_weights():
    engine = OneWeight(0.0)
    ema = EMA(engine, half_life_samples=100)
    engine.weight.fill_(1.0)
    expected = 0.0
    for n in range(1, 30):
        ema.update(100)
        beta = min(0.5, (1 + n) / (10 + n))
        expected = beta * expected + (1 - beta)
        torch.testing.assert_close(ema.partitions[0], torch.full((3,), expected))
    assert ema.updates == 29
    assert engine.weight.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("batch", [10, 50, 200])
def test_the_half_life_does_not_depend_on_the_batch(batch):
    engine = OneWeight(1.0)
    ema = EMA(engine, half_life_samples=1000)
    ema.updates = 10**6  # long past the cap
    engine.weight.zero_()
    for _ in range(1000 // batch):
        ema.update(batch)
    torch.testing.assert_close(ema.partitions[0], torch.full((3,), 0.5))


def test_an_export_shows_the_average_and_gives_the_weights_back():
    engine = OneWeight(2.0)
    ema = EMA(engine, half_life_samples=100)
    engine.weight.fill_(5.0)
    assert ema.full_state()["weight"].tolist() == [2.0, 2.0, 2.0]
    assert engine.weight.tolist() == [5.0, 5.0, 5.0]
