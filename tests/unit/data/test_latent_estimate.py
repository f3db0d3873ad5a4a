"""The arithmetic of an estimate, in figures that can be done by hand."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentray.data.latent_estimate import Measured, estimate, figure, in_bytes, in_time

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
    assert "2 h 30 min with 4 encoders" in text and "900 GB" in text and "20.0 cores" in text


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


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.00123, "0.00123"), (0.5, "0.500"), (4.5, "4.50"), (99.96, "100.0"), (12345.6, "12,346")],
)
def test_a_figure_has_three_digits_whatever_its_size(value, shown):
    assert figure(value) == shown


@given(value=st.floats(1e-9, 1e15))
def test_no_figure_rounds_to_nothing(value):
    assert float(figure(value).replace(",", "")) == pytest.approx(value, rel=0.006)


@given(count=st.integers(0, 10**17))
def test_bytes_are_shown_in_the_unit_that_fits(count):
    number, unit = in_bytes(count).split()
    power = ["bytes", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert float(number.replace(",", "")) * 1000**power == pytest.approx(count, rel=0.006)
    assert power == 0 or float(number.replace(",", "")) >= 1


def test_what_takes_less_than_a_second_is_told_in_milliseconds():
    assert (in_time(0.04), in_time(0.000321), in_time(8.3), in_time(0), in_time(9000)) == (
        "40.0 ms", "0.321 ms", "8.3 s", "0.0 s", "2 h 30 min",
    )  # fmt: skip


def test_a_tiny_set_has_an_estimate_that_says_something():
    tiny = WANTED | {"samples": 10, "records": 20, "price_per_hour": 2.0}
    text = "\n".join(estimate(dataclasses.replace(MEASURED, bytes=3000), **tiny).lines())
    assert "60.0 kB" in text and "10.0 ms with 4 encoders" in text and "cost 0.0000234" in text, text
