"""Gates decide without a registry; promotion acts on the decision, and a refusal leaves everything as it was."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentray.checkpoint import store
from latentray.config.promote import Gate, PromoteConfig, RelativeToLive
from latentray.errors import ConfigError, GateRefused, InputMissing
from latentray.registry import promotion, versions
from latentray.registry.promotion import decide

RELATIVE = RelativeToLive(max_regression=0.05)


def verdicts(decision):
    return [g.passed for g in decision.gates]


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(metric="samples.color_accuracy", min=0.95), True),
        (Gate(metric="samples.color_accuracy", min=0.951), False),
        (Gate(metric="fid", max=10.0), True),
        (Gate(metric="fid", max=9.99), False),
        (Gate(metric="heldout_loss"), True),
        (Gate(metric="heldout_loss.t500", max=0.01), False),
    ],
)
def test_absolute_bounds_include_their_limit(make_report, gate, passed):
    decision = decide(make_report(), None, [gate])
    assert verdicts(decision) == [passed]
    assert decision.decision == ("promoted" if passed else "refused")


def test_every_bound_of_a_gate_is_a_result(make_report):
    gate = Gate(metric="fid", min=1, max=5, relative_to_live=RELATIVE)
    assert verdicts(decide(make_report(), make_report(), [gate])) == [True, False, True]


@pytest.mark.parametrize("figure", [None, math.nan, math.inf])
def test_a_missing_figure_or_nan_is_invalid(make_report, figure):
    metrics = {"samples.color_accuracy": 1.0} | ({} if figure is None else {"fid": figure})
    gates = [Gate(metric="fid", max=100), Gate(metric="samples.color_accuracy", min=0.5)]
    decision = decide(make_report(metrics=metrics), None, gates)
    assert decision.decision == "invalid" and verdicts(decision) == [False, True]
    assert json.loads(json.dumps(decision.to_json(), allow_nan=False))["gates"][0]["got"] is None


@settings(max_examples=50, deadline=None)
@given(live=st.floats(-100, 100), new=st.floats(-100, 100), regression=st.floats(0, 1))
def test_relative_bounds(live, new, regression):
    gates = {
        m: Gate(metric=m, relative_to_live=RelativeToLive(max_regression=regression))
        for m in ("kid", "autoencoder.psnr")
    }
    before, after = (_report({"kid": v, "autoencoder.psnr": v}) for v in (live, new))
    lower, higher = (decide(after, before, [gates[m]]).gates[0].passed for m in ("kid", "autoencoder.psnr"))
    assert lower or new > live  # what is not worse always passes
    assert higher or new < live
    assert lower == (new - live <= regression * abs(live))
    assert higher == (live - new <= regression * abs(live))


def _report(metrics):
    from latentray.registry.report import EvaluationReport, FeatureNetworkId, SamplerSettings

    return EvaluationReport(
        model="m",
        dataset="d",
        feature_network=FeatureNetworkId(name="n", digest="f", resize="r"),
        samples=1,
        seed=0,
        sampler=SamplerSettings(sampler="ddim", steps=1, guidance_scale=1.0),
        metrics=metrics,
    )


def test_without_a_live_release_relative_bounds_pass(make_report):
    decision = decide(make_report(), None, [Gate(metric="fid", relative_to_live=RELATIVE)])
    assert decision.decision == "promoted" and "no live release" in decision.gates[0].why


@pytest.mark.parametrize("case", ["other samples", "no such figure", "unreadable"])
def test_what_cannot_be_compared_is_refused_unless_allowed(make_report, case):
    live = {"other samples": make_report(samples=9), "no such figure": make_report(metrics={}), "unreadable": None}[
        case
    ]
    problem = "a flipped bit" if case == "unreadable" else None
    gates = [Gate(metric="fid", relative_to_live=RELATIVE), Gate(metric="fid", max=50)]
    refused = decide(make_report(), live, gates, live_problem=problem)
    assert refused.decision == "refused" and verdicts(refused) == [False, True]
    assert "not comparable" in refused.gates[0].why
    allowed = decide(make_report(), live, gates, live_problem=problem, allow_incomparable=True)
    assert allowed.decision == "promoted"


def test_a_gate_on_an_unknown_metric_names_the_nearest(make_report):
    with pytest.raises(ConfigError, match=r"samples\.color_accuracy"):
        decide(make_report(), None, [Gate(metric="samples.colour_accuracy", min=0.5)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gate(metric="fid", min=2, max=1),
        lambda: RelativeToLive(max_regression=-1),
        lambda: RelativeToLive(max_regression=math.nan),
    ],
)
def test_gates_that_make_no_sense_are_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.fixture
def candidate(tmp_path, make_model, make_report):
    def make(name="model", *, seed=0, gates=None, alias="production", **report):
        uri, model = make_model(name, seed=seed)
        path = tmp_path / f"{name}.report.json"
        store.write_json(path, make_report(**({"model": model.digest} | report)).to_json())
        gates = gates or [Gate(metric="fid", max=20.0, relative_to_live=RELATIVE)]
        return PromoteConfig(model=uri, report=str(path), registry=str(tmp_path / "registry"), gates=gates, alias=alias)

    return make


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_promote_makes_a_release_and_moves_the_alias(candidate, capsys):
    config = candidate()
    release = promotion.promote(config)
    said = last_json(capsys)
    assert (said["decision"], said["release"], said["alias"]) == ("promoted", release, "production")
    assert versions.resolve(config.registry, "production")[0] == release
    assert promotion.promote(config) == release
    assert versions.read_alias(config.registry, "production").previous == ()


def test_a_worse_model_is_refused_and_nothing_changes(candidate, capsys):
    first = promotion.promote(candidate("good"))
    worse = candidate("worse", seed=1, metrics={"fid": 10.51})
    files = store.list_files(worse.registry)
    with pytest.raises(GateRefused, match=r"fid: wanted <= 10\.5 .*got 10\.51"):
        promotion.promote(worse)
    said = last_json(capsys)
    assert said["decision"] == "refused" and said["release"] is None and said["live_before"] == first
    assert store.list_files(worse.registry) == files
    assert versions.resolve(worse.registry, "production")[0] == first
    better = promotion.promote(candidate("within", seed=2, metrics={"fid": 10.49}))
    assert versions.rollback(worse.registry, "production") == first != better


def test_a_missing_figure_is_said_to_be_invalid(candidate, capsys):
    with pytest.raises(GateRefused, match=r"invalid.*fid: wanted <= 20.*got nothing"):
        promotion.promote(candidate(metrics={}))
    assert last_json(capsys)["decision"] == "invalid"


def test_a_report_of_another_model_is_refused(candidate, capsys):
    with pytest.raises(GateRefused, match="another model"):
        promotion.promote(candidate(model="x" * 64))
    assert last_json(capsys)["decision"] == "refused"


def test_a_damaged_live_release_blocks_only_until_allowed(candidate):
    first = promotion.promote(candidate("good"))
    config = candidate("next", seed=1)
    Path(versions.release_uri(config.registry, first), "report.json").write_text("{}")
    with pytest.raises(GateRefused, match="cannot be read") as error:
        promotion.promote(config)
    assert "allow_incomparable=true" in error.value.mend
    config.allow_incomparable = True
    assert versions.resolve(config.registry, "production")[0] == first != promotion.promote(config)


def test_a_model_or_report_that_is_not_there(candidate, tmp_path):
    for key in ("model", "report"):
        config = candidate(key)
        setattr(config, key, str(tmp_path / "nowhere"))
        with pytest.raises(InputMissing):
            promotion.promote(config)


def test_the_settings_are_checked(candidate):
    with pytest.raises(ConfigError, match="cannot be an alias"):
        candidate(alias="../production")
    with pytest.raises(ConfigError, match="no gate"):
        PromoteConfig(model="m", report="r")
