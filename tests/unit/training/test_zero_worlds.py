"""One state at every ZeRO stage and world size: what a checkpoint holds is the same, wherever it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentray.errors import ArtifactError
from latentray.training import partitions
from latentray.training.partitions import Fragment, Pieces

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("zero_worlds.py")
STATES = {"weight", "exp_avg", "exp_avg_sq", "ema"}


def _run(folder: Path, moves: str) -> Path:
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), moves], env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("worlds"), "0-2,1-1,2-2,3-3")


def _state(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    pieces = Pieces(sorted(folder.glob("*.safetensors")))
    assert set(pieces.states) == STATES
    return {state: pieces.full(state) for state in pieces.states}, pieces.scalars


def _require_equal(one: Path, other: Path) -> None:
    (a, numbers), (b, same) = _state(one), _state(other)
    assert numbers == same
    for state in STATES:
        assert a[state].keys() == b[state].keys()
        for name in a[state]:
            assert torch.equal(a[state][name], b[state][name]), f"{one.name} {other.name} {state} {name}"


def test_a_resumed_run_is_bit_equal_at_every_stage_precision_and_world(worlds: Path) -> None:
    resumed = sorted(worlds.glob("*-resumed"))
    assert len(resumed) == 3 * (4 + 3 + 4)
    for one in resumed:
        _require_equal(one, worlds / one.name.replace("resumed", "end"))


def _moves(folder: Path, count: int) -> None:
    moved = sorted((folder / "moved").iterdir())
    assert len(moved) == count
    for one in moved:
        origin = folder / one.name.split("-to-")[0]
        _require_equal(one, origin)
        losses = json.loads((one / "losses.json").read_text())
        undisturbed = json.loads((folder / f"{origin.name}-end" / "losses.json").read_text())
        assert losses == pytest.approx(undisturbed, rel=1e-5)


def test_weights_moments_and_average_go_to_every_stage_and_world_unchanged(worlds: Path) -> None:
    _moves(worlds, 4 * 4 * 3)


@pytest.mark.slow
def test_every_stage_and_world_goes_to_every_other(tmp_path: Path) -> None:
    _moves(_run(tmp_path, "all"), 12 * 4 * 3)


def test_a_dropped_step_leaves_nothing_behind(worlds: Path) -> None:
    without = sorted(worlds.glob("discarded-*-without"))
    assert len(without) == 8
    for one in without:
        _require_equal(one, worlds / one.name.replace("without", "with"))


def test_the_average_is_not_the_weights(worlds: Path) -> None:
    state, numbers = _state(worlds / "fp32-2-2")
    assert numbers == {"step": 3.0, "ema_updates": 3.0}
    assert not torch.equal(state["weight"]["0.weight"], state["ema"]["0.weight"])
    assert state["weight"]["2.weight"].shape == (5, 13)


def _written(folder: Path, cuts: list[tuple[int, int]]) -> tuple[Pieces, torch.Tensor]:
    whole = torch.arange(10.0)
    for rank, (start, numel) in enumerate(cuts):
        one = Fragment(name="w", shape=(2, 5), start=start, numel=numel, partition=0, offset=start)
        made = partitions.take([one], {"weight": [whole]}, {"step": 4.0})
        partitions.write(folder / f"rank_{rank:05d}.safetensors", made)
    return Pieces(sorted(folder.glob("*.safetensors"))), whole


def test_any_stretch_is_read_from_the_files_that_hold_it(tmp_path: Path) -> None:
    pieces, whole = _written(tmp_path, [(7, 3), (0, 4), (4, 3)])
    for start in range(10):
        for numel in range(1, 11 - start):
            assert torch.equal(pieces.stretch("weight", "w", start, numel), whole[start : start + numel])
    assert torch.equal(pieces.full("weight")["w"], whole.reshape(2, 5))


def test_a_gap_is_named(tmp_path: Path) -> None:
    pieces, _ = _written(tmp_path, [(0, 4), (6, 4)])
    with pytest.raises(ArtifactError, match="lacks elements from 4 on of weight of 'w'"):
        pieces.full("weight")


def test_another_network_is_refused_by_its_first_parameter(tmp_path: Path) -> None:
    pieces, _ = _written(tmp_path, [(0, 10)])
    with pytest.raises(ArtifactError, match=r"'w' is \(2, 5\) there, \(5, 2\) here; 1 more differ"):
        partitions.require_same(pieces, {"w": (5, 2), "v": (3,)})


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Pieces([tmp_path / "rank_00000.safetensors"])
