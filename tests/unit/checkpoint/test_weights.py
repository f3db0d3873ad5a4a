"""State dicts: exact round trips, and refusals that name the key."""

import pytest
import torch
from torch import nn

from latentray.checkpoint import weights
from latentray.errors import ArtifactError, WeightsMismatch


def test_a_round_trip_is_exact(tmp_path):
    state = {"a": torch.randn(3, 4).t(), "b": torch.tensor(7), "c": torch.randn(5).bfloat16()}
    weights.save(tmp_path / "x.safetensors", state)
    got = weights.read(tmp_path / "x.safetensors")
    assert got.keys() == state.keys()
    assert all(torch.equal(got[name], state[name]) and got[name].dtype == state[name].dtype for name in state)


def test_a_cut_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.save(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError) as caught:
        weights.read(path)
    assert caught.value.where == str(path)


def test_loading_names_the_first_key_that_differs():
    net = nn.Linear(3, 2)
    good = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    with pytest.raises(WeightsMismatch, match=r"weight is \(3, 2\), wanted \(2, 3\); 0 more differ") as caught:
        weights.load_into(net, good | {"weight": torch.ones(3, 2)}, where="somewhere")
    assert caught.value.where == "somewhere"
    assert isinstance(caught.value, ArtifactError) and isinstance(caught.value, ValueError)
    with pytest.raises(ArtifactError, match=r"bias is missing, wanted \(2,\)"):
        weights.load_into(net, {"weight": good["weight"]}, where="")
    with pytest.raises(ArtifactError, match=r"scale is \(1,\), wanted no such key; 1 more differ"):
        weights.load_into(net, good | {"scale": torch.ones(1), "shift": torch.ones(1)}, where="")
    weights.load_into(net, good, where="")
    assert torch.equal(net.weight, torch.ones(2, 3))
