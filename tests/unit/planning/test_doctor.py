"""The doctor as a whole: nothing hides anything, nothing hangs it, and the exit code says what it found."""

import json
import time

import pytest

from jobs import doctor as job
from latentray.config import compose
from latentray.config.doctor import DoctorConfig
from latentray.errors import ConfigError, StorageFailed
from latentray.planning import doctor, findings
from latentray.planning.findings import FAILED, OK, Finding


@pytest.fixture
def with_checks(monkeypatch):
    """with_checks(name=(limit, call), ...): the findings of these checks alone."""

    def examine(**given):
        wanted = [(name, limit, call) for name, (limit, call) in given.items()]
        monkeypatch.setattr(doctor, "checks", lambda config: wanted)
        told: list[str] = []
        return doctor.examine(DoctorConfig(), tell=told.append), told

    return examine


def test_a_check_that_hangs_is_given_up_and_the_others_are_told(with_checks):
    began = time.monotonic()
    found, told = with_checks(
        hanging=(0.3, lambda: time.sleep(30)),
        quick=(5, lambda: [Finding.ok("quick", "well")]),
    )
    assert time.monotonic() - began < 3
    assert [(one.name, one.status) for one in found] == [("hanging", FAILED), ("quick", OK)]
    assert "no answer within" in found[0].what
    assert told == ["quick: ok", "hanging: failed"]


def test_what_a_check_raises_is_its_finding(with_checks):
    def refused():
        raise StorageFailed("The store is down.", where="s3://b", mend="Start it.")

    def broken():
        yield Finding.ok("first", "told")
        raise KeyError("x")

    found, _ = with_checks(refused=(5, refused), broken=(5, broken))
    assert found[0] == Finding.failed("refused", "The store is down. (s3://b)", "Start it.")
    assert found[1].status == FAILED and "KeyError" in found[1].what


def test_the_settings_choose_the_checks():
    def names(*overrides):
        return [name for name, _, _ in doctor.checks(compose.load("doctor", DoctorConfig, list(overrides)))]

    assert names("cluster=none", "hub=false") == ["this machine", "ports", "W&B", "storage", "all-reduce"]
    assert names() == ["this machine", "ports", "W&B", "model hub", "cluster"]
    for override in ("serve_port=0", "timeout_s=-1"):
        with pytest.raises(ConfigError):
            names(override)


def test_findings_are_json_with_the_worst_status():
    found = [Finding.ok("a", "x"), Finding.warning("b", "y", "do"), Finding.ok("c", "z")]
    assert doctor.to_json(found)["status"] == "warning"
    assert doctor.to_json(found)["findings"][1] == {"name": "b", "status": "warning", "what": "y", "mend": "do"}
    assert findings.worst([]) == OK


def run(monkeypatch, capsys, *overrides):
    monkeypatch.setattr("sys.argv", ["doctor", *overrides])
    code = job.main()
    return code, capsys.readouterr()


@pytest.mark.slow
def test_the_job_ends_with_2_where_something_failed_and_0_where_nothing_did(monkeypatch, capsys, tmp_path):
    alone = ["cluster=none", "tracking=none", "hub=false", "json=true", "min_free_gb=0"]
    code, said = run(monkeypatch, capsys, *alone, f"storage={tmp_path}")
    told = json.loads(said.out)
    assert code == (2 if told["status"] == FAILED else 0)
    assert {one["name"]: one["status"] for one in told["findings"]}["storage"] == OK
    code, said = run(monkeypatch, capsys, *alone, "storage=/proc/latentray")
    assert code == 2 and json.loads(said.out)["status"] == FAILED
    assert "storage: failed" in said.err and "Traceback" not in said.err


def test_a_dead_cluster_is_one_row_and_exit_code_2(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "cluster.address=127.0.0.1:1", "tracking=none", "hub=false")
    assert code == 2
    assert "127.0.0.1:1 does not" in said.out and "ray start --head" in said.out
    assert "Traceback" not in said.out + said.err


def test_a_misspelt_setting_is_told_before_anything_is_asked(monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "min_free=1")
    assert code == 2 and "Did you mean 'min_free_gb'?" in said.err
