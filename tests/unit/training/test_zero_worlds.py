"""One state at every ZeRO stage and world size: what a checkpoint holds is the same, wherever it goes on."""

from __future__ import annotations

import itertools
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
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}", "OMP_NUM_THREADS": "1", "NVME": str(folder / "disk")}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), moves], env=environ, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other optimizers and offloads. Muon's kernels are not compiled: it is its state that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        return _run(tmp_path_factory.mktemp("others"), "special")


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


def _all_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    pieces = Pieces(sorted(folder.glob("*.safetensors")))
    found = {f"{state}/{name}": value for state in pieces.states for name, value in pieces.full(state).items()}
    for state, name in itertools.product(("row_var", "col_var"), pieces.shapes):
        if (whole := pieces.whole(state, name)) is not None:
            found[f"{state}/{name} whole"] = whole
    return found, pieces.scalars


def _require_all_equal(one: Path, other: Path) -> None:
    (a, numbers), (b, same) = _all_of(one), _all_of(other)
    assert numbers == same
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert not differing, f"{one.name} {other.name} {differing}"


def test_every_optimizer_and_offload_is_resumed_bit_for_bit(others: Path) -> None:
    resumed = sorted(others.glob("*-resumed"))
    assert len(resumed) == 2 * (11 + 3)
    for one in resumed:
        _require_all_equal(one, others / one.name.replace("resumed", "end"))


def test_every_optimizer_and_offload_goes_to_another_world_and_stage(others: Path) -> None:
    moved = [one for one in sorted((others / "moved").iterdir()) if not one.name.endswith("-end")]
    assert len(moved) == 2 * 11
    for one in moved:
        origin = others / one.name.split("-to-")[0]
        _require_all_equal(one, origin)
        losses = json.loads((one.with_name(f"{one.name}-end") / "losses.json").read_text())
        undisturbed = json.loads((others / f"{origin.name}-end" / "losses.json").read_text())
        assert losses == pytest.approx(undisturbed, rel=5e-3 if "muon" in one.name else 1e-5)  # Muon rounds to 16 bits


def test_an_optimizer_on_a_disk_learns_what_one_in_memory_learns(others: Path) -> None:
    for stage in (1, 2, 3):  # of two ranks: with three, gloo's order of adding depends on what came before
        _require_all_equal(others / f"disk-{stage}-None-2-end", others / f"offload-{stage}-None-2-end")
    assert list((others / "disk").iterdir()) == []


def test_each_optimizer_keeps_the_states_that_are_its_own(others: Path) -> None:
    muon, _ = _all_of(others / "muon-2-None-3")
    assert {key for key in muon if key.startswith("momentum_buffer/")} == {
        "momentum_buffer/2.0.weight",
        "momentum_buffer/2.2.weight",
    }
    assert "exp_avg/0.weight" in muon
    assert "exp_avg/2.0.weight" not in muon
    factored, _ = _all_of(others / "adafactor-0-None-3")
    assert factored["row_var/2.0.weight whole"].shape == (11, 1)
    assert factored["col_var/2.0.weight whole"].shape == (1, 13)
    assert not any(key.startswith("exp_avg") for key in factored)


def test_muon_takes_accumulated_steps_like_whole_ones(others: Path) -> None:
    for stage, world in itertools.product((0, 1, 2), (2, 3)):
        whole, parts = (
            json.loads((others / f"muon-{stage}-{micro}-{world}-end" / "losses.json").read_text())
            for micro in (None, 1)
        )
        assert whole == pytest.approx(parts, rel=5e-3)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path: Path) -> None:
    _run(tmp_path, "compiled")
    found = sorted(tmp_path.glob("compiled-*.json"))
    assert len(found) == 5
    for one in found:
        losses = json.loads(one.read_text())
        assert losses["True"] == pytest.approx(losses["False"], rel=1e-5 if "fp32" in one.name else 1e-2), one.name


@pytest.mark.slow
def test_every_stage_and_world_goes_to_every_other(tmp_path: Path) -> None:
    _moves(_run(tmp_path, "all"), 12 * 4 * 3)


def test_a_dropped_step_leaves_nothing_behind(worlds: Path) -> None:
    without = sorted(worlds.glob("discarded-*-without"))
    assert len(without) == 8 + 3
    for one in without:
        _require_equal(one, worlds / one.name.replace("without", "with"))


def test_the_average_is_not_the_weights(worlds: Path) -> None:
    state, numbers = _state(worlds / "fp32-2-2")
    assert numbers == {"step": 3.0, "ema_updates": 3.0}
    assert not torch.equal(state["weight"]["0.weight"], state["ema"]["0.weight"])
    assert state["weight"]["2.2.weight"].shape == (5, 11)


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
