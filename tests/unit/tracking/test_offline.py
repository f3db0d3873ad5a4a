"""How far W&B's own files reach, read from their end, whatever a killed process left of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.tracking import offline

BLOCK = 32768


def _log(payloads):
    """LevelDB's log format, with checksums left at zero: nobody here reads them."""
    out = bytearray(b":W&B\0\0\0"[:7])
    for payload in payloads:
        rest, first = payload, True
        while True:
            room = BLOCK - len(out) % BLOCK
            if room < 7:
                out += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            out += bytes(4) + len(part).to_bytes(2, "little") + bytes([kind]) + part
            first = False
            if not rest:
                break
    return bytes(out)


def _history(step, padding=0):
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    record.history.step.num = step
    record.history.item.add(key="a", value_json="1" + "0" * padding)
    return record.SerializeToString()


def _write(root, data, name="offline-run-20260101_000000-r"):
    folder = root / "wandb" / name
    folder.mkdir(parents=True)
    (folder / "run-r.wandb").write_bytes(data)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 70_000), max_size=12), cut=st.floats(0, 1))
def test_every_whole_record_of_a_file_that_was_cut_off_is_read(sizes, cut):
    payloads = [bytes([i]) * size for i, size in enumerate(sizes, start=1)]
    data = _log(payloads)
    assert list(offline._records(data, 0)) == payloads
    assert payloads[: len(found := list(offline._records(data[: int(cut * len(data))], 0)))] == found


@pytest.mark.parametrize("padding", [10, 40_000])
def test_the_last_step_is_found_from_the_end_of_a_long_file(tmp_path, padding):
    _write(tmp_path, _log([_history(step, padding) for step in range(100)]))
    assert offline.last_step(tmp_path, "r") == 99


def test_a_megabyte_without_history_does_not_hide_the_steps_before(tmp_path):
    _write(tmp_path, _log([_history(7), *[b"\x00" * 60_000] * 40]))
    assert offline.last_step(tmp_path, "r") == 7


def test_all_attempts_of_this_run_count_and_no_others(tmp_path):
    _write(tmp_path, _log([_history(5)]))
    _write(tmp_path, _log([_history(9)]), name="run-20260102_000000-r")
    _write(tmp_path, _log([_history(50)]), name="run-20260102_000000-other")
    _write(tmp_path, b"", name="offline-run-20260103_000000-r")
    assert offline.last_step(tmp_path, "r") == 9
    assert offline.last_step(tmp_path, "s") == -1
