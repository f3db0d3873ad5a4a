"""`python -m jobs.submit` against a real cluster with a dashboard and token authentication."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import submission
from latentray.config.submit import SubmitConfig
from latentray.errors import AlreadyExists

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.cluster


def run_submit(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.submit", f"python={sys.executable}", *argv]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def test_a_job_runs_there_and_its_output_arrives(dashboard: str, tmp_path: Path) -> None:
    done = run_submit("job=releases", f"address={dashboard}", "--", f"registry={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    first, output = done.stdout.split("\n", 1)
    assert f"-m jobs.releases registry={tmp_path}" in first
    assert "No releases in" in output, "the job's own output"
    assert "succeeded" in output


def test_the_exit_code_of_a_users_mistake_passes_through(dashboard: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = SubmitConfig(job="releases", address=dashboard, python=sys.executable)
    assert submission.submit(config, ["registry={a: 1}"]) == 2
    output = capfd.readouterr().out
    assert "error:" in output and "Traceback" not in output
    assert "failed" in output


def test_a_cluster_refuses_another_token(dashboard: str) -> None:
    done = run_submit("job=releases", f"address={dashboard}", RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_checkout_travels_to_driver_and_workers(dashboard: str) -> None:
    """The package is imported from what was shipped, not from an installation, in the driver and in a worker."""
    program = (
        "import json, os, latentray, ray; ray.init(logging_level='error');"
        "where = ray.remote(lambda: (os.environ['TRAVELS'], __import__('latentray').__file__));"
        "print(json.dumps([latentray.__file__, *ray.get(where.remote()), *map(os.path.exists, ('tests', 'conf'))]))"
    )
    config = SubmitConfig(job="releases", address=dashboard, env={"TRAVELS": "yes"})
    client = submission.connect(dashboard)
    identity = client.submit_job(
        entrypoint=f'{sys.executable} -c "{program}"', runtime_env=submission.runtime_env(config)
    )
    output: list[str] = []
    assert submission.follow(client, identity, output.append) == 0, "".join(output)
    (line,) = [x for x in "".join(output).splitlines() if x.startswith("[")]
    driver, variable, worker, has_tests, has_conf = json.loads(line)
    assert "working_dir_files" in driver and "working_dir_files" in worker
    assert variable == "yes"
    assert has_conf and not has_tests, ".rayignore"


def test_a_repeated_submission_id_follows_instead_of_starting_again(dashboard: str, tmp_path: Path) -> None:
    config = SubmitConfig(
        job="releases", address=dashboard, python=sys.executable, submission_id="nightly-1", wait=False
    )
    before = len(submission.connect(dashboard).list_jobs())
    assert submission.submit(config, [f"registry={tmp_path}"]) == 0
    assert submission.submit(config, [f"registry={tmp_path}"]) == 0
    assert len(submission.connect(dashboard).list_jobs()) == before + 1
    with pytest.raises(AlreadyExists, match="nightly-1"):
        submission.submit(config, [f"registry={tmp_path}/other"])
