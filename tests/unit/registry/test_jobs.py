"""The three jobs as a user runs them: composed from conf/, exit codes, messages, JSON on the last line."""

import json
import sys

import pytest

from jobs import promote, releases, rollback
from latentray.checkpoint import store
from latentray.config import compose
from latentray.config.promote import PromoteConfig
from latentray.registry import versions
from latentray.registry.report import direction


@pytest.fixture
def run(monkeypatch, capsys):
    def call(job, *args):
        monkeypatch.setattr(sys, "argv", [job.__name__, *args])
        code = job.main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def arguments(tmp_path, make_model, make_report):
    def make(name="model", *, seed=0, **report):
        uri, model = make_model(name, seed=seed)
        path = tmp_path / f"{name}.report.json"
        store.write_json(path, make_report(**({"model": model.digest} | report)).to_json())
        return [f"model={uri}", f"report={path}", f"registry={tmp_path / 'registry'}"]

    return make


@pytest.mark.parametrize("gates", ["default", "shapes"])
def test_shipped_gates_compose_and_name_known_metrics(gates):
    config = compose.load("promote", PromoteConfig, ["model=m", "report=r", f"gates={gates}"])
    assert config.gates
    for gate in config.gates:
        direction(gate.metric)


def test_the_shapes_gates_are_the_promised_figures():
    config = compose.load("promote", PromoteConfig, ["model=m", "report=r", "gates=shapes"])
    assert {g.metric.removeprefix("samples."): g.min for g in config.gates} == {
        "color_accuracy": 0.90,
        "background_accuracy": 0.95,
        "shape_accuracy": 0.75,
        "heldout_color_accuracy": 0.75,
    }


def test_promote_list_and_roll_back(run, arguments, tmp_path):
    registry = f"registry={tmp_path / 'registry'}"
    ids = []
    for i in range(2):
        code, out, _ = run(promote, *arguments(f"m{i}", seed=i), "gates=shapes")
        assert code == 0
        ids.append(json.loads(out.splitlines()[-1])["release"])
    code, out, _ = run(releases, registry)
    assert code == 0 and all(one in out for one in ids)
    code, out, _ = run(rollback, registry)
    assert code == 0 and json.loads(out.splitlines()[-1]) == {"alias": "production", "release": ids[0]}
    assert versions.resolve(str(tmp_path / "registry"), "production")[0] == ids[0]
    code, _, err = run(rollback, registry)
    assert code == 2 and "no release to go back to" in err and "Traceback" not in err


def test_a_refusal_exits_with_2_and_says_gate_wanted_and_got(run, arguments):
    code, out, err = run(promote, *arguments(metrics={"fid": 1.0, "samples.color_accuracy": 0.5}), "gates=shapes")
    assert code == 2 and json.loads(out.splitlines()[-1])["decision"] == "invalid"
    assert "samples.color_accuracy: wanted >= 0.9, got 0.5" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("aliass=x", "alias"),
        ("gates=shape", "gates=shapes"),
        ("alias=Production", "cannot be an alias"),
        ("allow_incomparable=perhaps", "allow_incomparable"),
    ],
)
def test_mistakes_in_the_settings_are_one_message(run, arguments, change, said):
    code, _, err = run(promote, *arguments(), change)
    assert code == 2 and said in err and "Traceback" not in err


def test_missing_settings_and_inputs_are_one_message(run, arguments, tmp_path):
    code, _, err = run(promote)
    assert code == 2 and "model" in err and "Traceback" not in err
    code, _, err = run(promote, f"model={tmp_path / 'nowhere'}", "report=x")
    assert code == 2 and "nowhere" in err


def test_an_empty_registry_lists_nothing(run, tmp_path):
    code, out, _ = run(releases, f"registry={tmp_path}")
    assert code == 0 and "No releases" in out
