"""The ingress's view of the samplers, with a handle that answers as told."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from latentray.errors import RequestRefused
from serving import deployments
from serving.deployments import HandleBackend


class Handle:
    """Like a DeploymentHandle: `info.remote()` can be awaited; `answer` is a value, an exception or None (silence)."""

    def __init__(self, answer) -> None:
        self.answer, self.asked, self.cancelled = answer, 0, 0
        self.info = self.draw = self

    def remote(self, *args):
        self.asked += 1
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def __await__(self):
        return self._reply().__await__()

    async def _reply(self):
        if self.answer is None:
            await asyncio.sleep(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def wrapped(cause: Exception) -> RayTaskError:
    return RayTaskError("draw", "traceback", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (None, 504, "timeout"),
        (BackPressureError(num_queued_requests=8, max_queued_requests=8), 429, "queue_full"),
        (ActorUnavailableError("gone", None), 503, "sampler_lost"),
        (wrapped(RequestRefused("no such sampler", param="sampler")), 400, "invalid_value"),
    ],
)
def test_what_goes_wrong_behind_the_ingress_has_its_status(answer, status, code):
    handle = Handle(answer)
    with pytest.raises(RequestRefused) as caught:
        asyncio.run(HandleBackend(handle, request_timeout_s=0.05).draw([]))
    assert (caught.value.status, caught.value.code) == (status, code)
    assert handle.cancelled == (status == 504), "a request given up is cancelled, not left to be drawn"


def test_an_unexpected_error_stays_one():
    with pytest.raises(RuntimeError):
        asyncio.run(HandleBackend(Handle(wrapped(RuntimeError("bug"))), request_timeout_s=1).draw([]))


def test_known_bounds_are_kept_for_a_while_and_used_while_the_sampler_is_busy(info, monkeypatch):
    handle = Handle(info)
    backend = HandleBackend(handle, request_timeout_s=1)

    async def ask() -> None:
        assert await backend.info() is info and await backend.info() is info
        assert handle.asked == 1
        monkeypatch.setattr(deployments, "INFO_FRESH_S", 0.0)
        monkeypatch.setattr(deployments, "RENEW_S", 0.01)
        handle.answer = None
        assert await backend.info() is info
        handle.answer = "renewed"
        assert await backend.info() == "renewed"

    asyncio.run(ask())


@pytest.mark.parametrize(("answer", "ready"), [("info", True), (RuntimeError("dead"), False), (None, False)])
def test_ready_is_what_the_sampler_says(answer, ready, monkeypatch):
    monkeypatch.setattr(deployments, "PROBE_S", 0.02)
    assert asyncio.run(HandleBackend(Handle(answer), request_timeout_s=1).ready()) is ready


def test_a_busy_sampler_that_answered_lately_is_ready(monkeypatch):
    monkeypatch.setattr(deployments, "PROBE_S", 0.02)
    handle = Handle("info")
    backend = HandleBackend(handle, request_timeout_s=1)

    async def ask() -> tuple[bool, bool]:
        await backend.ready()
        handle.answer = None
        lately = await backend.ready()
        handle.answer = ActorUnavailableError("gone", None)
        assert not await backend.ready(), "lost is not busy"
        handle.answer = None
        monkeypatch.setattr(deployments, "BUSY_S", 0.0)
        return lately, await backend.ready()

    assert asyncio.run(ask()) == (True, False)
