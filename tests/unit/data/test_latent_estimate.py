"""The arithmetic of an estimate, in figures that can be done by hand."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentray.data.latent_estimate import Measured, estimate

MEASURED = Measured(decode_seconds=0.01, encode_seconds=0.002, bytes=50_000)
WANTED = dict(
    samples=9_000_000, records=18_000_000, copied=0, encoders=4, epochs=10.0, price_per_hour=3.0, storage_price=20.0
)


def test_hours_bytes_and_cost_follow_from_what_was_measured():
    found = estimate(MEASURED, **WANTED)
    assert found.bytes == 900 * 10**9
    assert found.hours == pytest.approx(10 / 4)  # 18e6 x 2 ms are ten encoder hours
    assert found.decode_cores == pytest.approx(20)
    assert found.cost == pytest.approx(10 * 3 + 0.9 * 20)
    assert found.online_hours == pytest.approx(50) and found.online_cost == pytest.approx(150)
    assert found.break_even_epochs == pytest.approx(48 / 15)
    assert found.storing_is_cheaper
    assert json.loads(json.dumps(found.to_json()))["records"] == 18_000_000
    text = "\n".join(found.lines())
    assert "2 h 30 min with 4 encoders" in text and "900.00 GB" in text and "20.0 cores" in text


def test_what_is_copied_costs_storage_alone():
    found = estimate(MEASURED, **WANTED | {"copied": 18_000_000})
    assert found.hours == 0 and found.cost == pytest.approx(18) and found.bytes == 900 * 10**9


def test_without_a_price_hours_decide_and_storage_is_free():
    free = WANTED | {"price_per_hour": 0.0}
    found = estimate(MEASURED, **free)
    assert found.break_even_epochs == pytest.approx(2)  # two variants: as much work as two epochs
    assert found.storing_is_cheaper
    assert not estimate(MEASURED, **free | {"epochs": 1.5}).storing_is_cheaper


@given(epochs=st.floats(0.1, 100), price=st.floats(0.01, 100), storage=st.floats(0, 1000))
def test_storing_is_cheaper_beyond_the_break_even_and_only_there(epochs, price, storage):
    found = estimate(MEASURED, **WANTED | {"epochs": epochs, "price_per_hour": price, "storage_price": storage})
    if abs(epochs - found.break_even_epochs) > 1e-6 * epochs:
        assert found.storing_is_cheaper == (epochs > found.break_even_epochs)
        assert found.storing_is_cheaper == (found.cost < found.online_cost)
