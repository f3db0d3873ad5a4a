"""The report's schema: JSON there and back, canonical names, and what may be compared with what."""

import json
import math

import pytest

from latentray.checkpoint import manifest, store
from latentray.errors import ArtifactError, DigestMismatch, InputMissing
from latentray.registry import report as reports
from latentray.registry.report import EvaluationReport, FeatureNetworkId, comparable, direction


def test_json_there_and_back(make_report):
    report = make_report()
    text = json.dumps(report.to_json(), allow_nan=False)
    again = EvaluationReport.from_json(json.loads(text))
    assert again == report and again.digest == report.digest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_survives_json_as_none(make_report, bad):
    text = json.dumps(make_report(metrics={"fid": bad}).to_json(), allow_nan=False)
    assert math.isnan(EvaluationReport.from_json(json.loads(text)).metrics["fid"])


def test_the_digest_follows_every_field(make_report):
    digests = {
        r.digest
        for r in (
            make_report(),
            make_report(seed=1),
            make_report(samples=1),
            make_report("x" * 64),
            make_report(metrics={"fid": 1.0}),
        )
    }
    assert len(digests) == 5


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("fid", "lower"),
        ("autoencoder.psnr", "higher"),
        ("heldout_loss.t875", "lower"),
        ("heldout_loss.t-403", "lower"),
        ("samples.shape_accuracy", "higher"),
    ],
)
def test_directions(metric, better):
    assert direction(metric) == better


@pytest.mark.parametrize("metric", ["fdi", "heldout_loss.t", "heldout_loss.tx", "samples.colour_accuracy"])
def test_a_name_that_is_not_canonical_is_refused(make_report, metric):
    with pytest.raises(ValueError, match="no metric"):
        make_report(metrics={metric: 1.0})


def test_the_nearest_name_is_given():
    with pytest.raises(ValueError, match=r"did you mean 'samples\.color_accuracy'"):
        direction("samples.colour_accuracy")


def test_comparable(make_report):
    report = make_report()
    network = report.feature_network
    assert comparable(report, make_report("x" * 64, seed=5)) is None
    changes = {
        "data sets": dict(dataset="e" * 64),
        "sample counts": dict(samples=100),
        "feature networks": dict(feature_network=FeatureNetworkId(name="net", digest="0" * 64, resize=network.resize)),
        "resize": dict(feature_network=FeatureNetworkId(name="net", digest=network.digest, resize="nearest")),
    }
    for what, change in changes.items():
        assert what in comparable(report, make_report(**change))


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"metrics": None}, {"sampler": {}}, {"surplus": 1}, {"metrics": {"fdi": 1}}], ids=str
)
def test_a_report_of_another_format_is_refused(make_report, change):
    with pytest.raises(ArtifactError, match="evaluation report"):
        EvaluationReport.from_json(make_report().to_json() | change)


def test_loading_an_artifact_and_a_bare_file(tmp_path, make_report):
    report = make_report()
    store.write_json(tmp_path / "files" / "report.json", report.to_json())
    manifest.publish(tmp_path / "files", tmp_path / "report", kind="report")
    assert reports.load(str(tmp_path / "report")) == report
    assert reports.load(str(tmp_path / "files" / "report.json")) == report
    changed = (tmp_path / "report" / "report.json").read_text().replace("0.95", "0.99")
    (tmp_path / "report" / "report.json").write_text(changed)
    with pytest.raises(DigestMismatch):
        reports.load(str(tmp_path / "report"))


def test_a_report_that_is_not_there_or_no_json(tmp_path):
    with pytest.raises(InputMissing):
        reports.load(str(tmp_path / "nowhere"))
    for content in (b"{", b"[]", b"\xff"):
        (tmp_path / "report.json").write_bytes(content)
        with pytest.raises(ArtifactError):
            reports.load(str(tmp_path / "report.json"))
