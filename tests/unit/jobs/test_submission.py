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


def test_a_driver_that_died_is_sent_again_and_a_mistake_is_not() -> None:
    again = submission.is_worth_another
    assert [again(code, 0, 2) for code in (1, 137, 0, 2, 143, 130)] == [True, True, False, False, False, False]
    assert [again(1, attempt, 2) for attempt in range(4)] == [True, True, False, False]


def test_a_run_that_may_be_sent_again_has_a_name() -> None:
    assert submission.named(["size=64"], job="train", retries=0) == ["size=64"]
    assert submission.named(["run=mine"], job="train", retries=3) == ["run=mine"]
    (given, name) = submission.named(["size=64"], job="train", retries=3)
    assert given == "size=64" and name.startswith("run=train-")
    assert submission.named([], job="evaluate", retries=3) == []


def test_the_same_run_is_sent_until_it_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str | None, str]] = []
    codes = iter([137, 1, 0])

    class Client:
        def submit_job(self, *, entrypoint: str, submission_id: str | None, **_: Any) -> str:
            sent.append((submission_id, entrypoint))
            return submission_id or "made"

    monkeypatch.setattr(submission, "require_cluster", lambda *_: None)
    monkeypatch.setattr(submission, "connect", lambda _: Client())
    monkeypatch.setattr(submission, "follow", lambda *_: next(codes))
    config = SubmitConfig(job="train", retries=5, submission_id="night")
    assert submission.submit(config, ["tracking=none"]) == 0
    assert [one for one, _ in sent] == ["night", "night.1", "night.2"]
    assert len({command for _, command in sent}) == 1 and " run=train-" in sent[0][1]
