"""Reading ahead: the same items in the same order, one early; errors in their place; no thread left behind."""

import threading

import pytest

from latentray.data.read_ahead import ahead
from latentray.errors import DataError


def test_reading_is_one_batch_ahead_and_errors_come_in_their_place():
    made = []

    def items():
        for number in range(4):
            made.append(number)
            yield number
        raise DataError("the fifth is damaged")

    reading = ahead(items())
    for number in range(4):
        assert next(reading) == number
        assert made[: number + 1] == list(range(number + 1)) and len(made) <= number + 2
    with pytest.raises(DataError, match="the fifth"):
        next(reading)


def test_a_reader_that_is_left_ends_its_thread():
    reading = ahead(iter(range(100)))
    assert next(reading) == 0
    threads = [one for one in threading.enumerate() if one.name.startswith("read-ahead")]
    reading.close()
    assert threads and not any(one.is_alive() for one in threads)
