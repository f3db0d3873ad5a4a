"""W&B, hub and ports, against real servers and real silence."""

import http.server
import socket
import threading
import time

import pytest

from latentray.config.tracking import TrackingConfig
from latentray.planning import machine, service_checks
from latentray.planning.findings import FAILED, OK, WARNING


@pytest.fixture
def server():
    """serve(status): the port of a server that answers everything so."""
    running = []

    def serve(status: int) -> int:
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        running.append(one)
        return one.server_address[1]

    yield serve
    for one in running:
        one.shutdown()
        one.server_close()


@pytest.fixture
def silent():
    """The port of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(5)
        yield listening.getsockname()[1]


@pytest.fixture(autouse=True)
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def tracking(**settings):
    (found,) = service_checks.tracking(TrackingConfig(**settings), timeout_s=0.5)
    return found


def test_wandb_without_a_key_is_offline_and_online_without_one_fails():
    offline = tracking()
    assert offline.status == WARNING and "wandb sync" in offline.mend
    online = tracking(mode="online")
    assert online.status == FAILED and "WANDB_API_KEY" in online.mend
    assert tracking(mode="disabled").status == OK


def test_wandb_with_a_key_answers_or_is_told(monkeypatch, server, silent):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server(404)}")
    assert tracking().status == OK  # any answer is one
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent}")
    began = time.monotonic()
    found = tracking()
    assert found.status == WARNING and "wandb sync" in found.mend
    assert time.monotonic() - began < 5


def test_the_hub_is_a_warning_at_most(monkeypatch, server):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{machine.free_port()}")
    (found,) = service_checks.hub(timeout_s=0.5)
    assert found.status == WARNING and "refused" in found.what
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server(200)}")
    assert service_checks.hub(timeout_s=2)[0].status == OK
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "local" in service_checks.hub()[0].what


def test_the_endpoints_port_is_free_taken_or_its_own(server):
    free = machine.free_port()
    assert [one.status for one in service_checks.ports(free, free)] == [OK, OK]
    taken, own = server(404), server(200)
    serve, dashboard = service_checks.ports(taken, taken)
    assert serve.status == FAILED and "ss -ltnp" in serve.mend
    assert dashboard.status == OK  # something answers: a dashboard may refuse without a token
    assert service_checks.ports(own, free)[0].status == OK


def test_what_is_no_address_is_told():
    assert service_checks.answer_error("file:///etc/passwd", 1)
