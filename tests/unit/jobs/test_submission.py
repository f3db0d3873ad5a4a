"""What `jobs.submit` checks before it asks a cluster, and how it follows a job, against a scripted client."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import submission
from latentray.config import compose
from latentray.config.submit import SubmitConfig
from latentray.errors import ConfigError, EnvironmentRefused


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def test_what_stands_after_the_dashes_belongs_to_the_job() -> None:
    split = submission.split_command_line
    assert split(["job=train", "wait=false", "--", "stage=autoencoder", "a=[1,2]"]) == (
        ["job=train", "wait=false"],
        ["stage=autoencoder", "a=[1,2]"],
    )
    assert split(["job=train"]) == (["job=train"], [])


def test_the_settings_compose() -> None:
    config = compose.load("submit", SubmitConfig, ["job=releases", "overrides=['registry=s3://b/r']", "+env.A=b"])
    assert config.overrides == ["registry=s3://b/r"]
    assert config.env == {"A": "b"}


def test_only_programs_can_be_sent() -> None:
    names = submission.job_names()
    assert "releases" in names
    assert not {"submit", "submission", "__init__"} & set(names)


def test_an_unknown_job_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="job=releases"):
        submission.submit(SubmitConfig(job="relaeses"))


def test_a_misspelt_setting_of_the_job_is_told_before_the_cluster_is_asked(closed_port: int) -> None:
    config = SubmitConfig(job="releases", address=f"http://127.0.0.1:{closed_port}")
    with pytest.raises(ConfigError, match="registry"):
        submission.submit(config, ["regitsry=runs/registry"])


def test_no_cluster_is_told_at_once(closed_port: int) -> None:
    begun = time.monotonic()
    with pytest.raises(EnvironmentRefused, match=str(closed_port)):
        submission.submit(SubmitConfig(job="releases", address=f"http://127.0.0.1:{closed_port}"))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("address", "ray://head:10001"),
        ("address", "head"),
        ("submission_id", "a b"),
        ("submission_id", "$(reboot)"),
        ("python", " "),
        ("cpus", -1.0),
        ("connect_timeout_s", 0.0),
    ],
)
def test_bad_settings_are_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SubmitConfig(**{"job": "releases", key: value})
    assert caught.value.where == key


def test_overrides_reach_the_job_unchanged_by_the_shell() -> None:
    command = submission.entrypoint(SubmitConfig(job="train"), ["prompt='a red circle; rm -rf x'", "data=s3://b/x"])
    assert command == """python -m jobs.train 'prompt='"'"'a red circle; rm -rf x'"'"'' data=s3://b/x"""


class DroppingClient:
    """A Jobs API whose log stream drops twice; every connection starts from the beginning, as Ray's does."""

    LOG = "one\ntwo\nthree\nfour\n"

    def __init__(self, exit_code: int | None) -> None:
        self.exit_code, self.connections = exit_code, 0

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        self.connections += 1
        pieces = ["one\n", "two\n"] if self.connections < 3 else ["one\ntwo\nthr", "ee\nfour\n"]
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece
        if self.connections < 3:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_logs(self, _: str) -> str:
        return "one\ntwo\nthr" if self.connections < 3 else self.LOG

    def get_job_info(self, _: str) -> SimpleNamespace:
        over = self.connections >= 3
        status = ("SUCCEEDED" if self.exit_code == 0 else "FAILED") if over else "RUNNING"
        return SimpleNamespace(
            status=SimpleNamespace(value=status, is_terminal=lambda: over),
            driver_exit_code=self.exit_code,
            message="the node died",
        )


@pytest.mark.parametrize(("exit_code", "returned"), [(0, 0), (2, 2), (None, 1)])
def test_a_dropped_stream_goes_on_where_it_stopped(
    exit_code: int | None, returned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "POLL_S", 0.01)
    output: list[str] = []
    client: Any = DroppingClient(exit_code)
    assert submission.follow(client, "job-1", output.append) == returned
    assert "".join(output) == DroppingClient.LOG
