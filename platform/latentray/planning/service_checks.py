"""What lies outside the machines: W&B, the model hub, and the ports that the endpoint and the dashboard want."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from latentray.config.tracking import TrackingConfig
from latentray.planning import machine
from latentray.planning.findings import Finding
from latentray.tracking.wandb_tracker import api_key, base_url, effective_mode

ANSWER_S = 5.0
_SYNC = "the run is recorded offline; upload it later: wandb sync <run's folder>/wandb/offline-run-*"


def tracking(config: TrackingConfig, *, timeout_s: float = ANSWER_S) -> list[Finding]:
    """W&B: what the settings come to here, the key, and whether the server answers."""
    name, mode = "W&B", effective_mode(config)
    if mode == "disabled":
        return [Finding.ok(name, "off: metrics.jsonl beside the run only")]
    if mode == "online" and api_key() is None:
        mend = "Set WANDB_API_KEY (or run `wandb login`), or use tracking.mode=offline."
        return [Finding.failed(name, f"online tracking without a key for {base_url()}", mend)]
    if mode == "offline":
        return [Finding.warning(name, "offline", f"Nothing, if that is meant: {_SYNC}.")]
    error = answer_error(base_url(), timeout_s)
    if error:
        return [
            Finding.warning(name, f"{base_url()} does not answer: {error}", f"Look at the network. Until then {_SYNC}.")
        ]
    return [Finding.ok(name, f"key found, {base_url()} answers")]


def hub(*, timeout_s: float = ANSWER_S) -> list[Finding]:
    """The hub that text encoders come from, unless they are local."""
    name, where = "model hub", os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return [Finding.ok(name, "HF_HUB_OFFLINE is set: only what is local is used")]
    error = answer_error(where, timeout_s)
    if error:
        mend = "Give local ones, text_encoder.source=<folder> and stage.lpips.weights=<file>, and set HF_HUB_OFFLINE=1."
        return [Finding.warning(name, f"{where} does not answer: {error}", mend)]
    return [Finding.ok(name, f"{where} answers")]


def ports(serve_port: int, dashboard_port: int) -> list[Finding]:
    """The ports on this machine: the endpoint's must be free, or its own; Ray's dashboard takes the next one."""
    return [_serve_port(serve_port), _dashboard_port(dashboard_port)]


def _serve_port(port: int) -> Finding:
    name = f"port {port} (endpoint)"
    error = machine.port_error(port)
    if not error:
        return Finding.ok(name, "free")
    if not answer_error(f"http://127.0.0.1:{port}/healthz", 2.0, only_success=True):
        return Finding.ok(name, "an endpoint answers there already")
    return Finding.failed(
        name, f"cannot be listened on: {error}", "End what holds it (ss -ltnp), or serve with port=<another>."
    )


def _dashboard_port(port: int) -> Finding:
    name = f"port {port} (dashboard)"
    if not machine.port_error(port):
        return Finding.ok(name, "free")
    if not answer_error(f"http://127.0.0.1:{port}/api/version", 2.0):
        return Finding.ok(name, "in use, and answers: a cluster runs here")
    return Finding.warning(
        name, "in use", "Ray takes the next free one; jobs.submit wants address=http://127.0.0.1:<it>."
    )


def answer_error(url: str, timeout_s: float, *, only_success: bool = False) -> str:
    """Why a server gives no HTTP answer; empty where it gives one, whichever (`only_success`: a 2xx)."""
    if urlsplit(url).scheme not in ("http", "https"):
        return "it is no http address"
    try:
        urllib.request.urlopen(url, timeout=timeout_s).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if only_success else ""
    except urllib.error.URLError as error:
        return str(error.reason)
    except OSError as error:
        return str(error)
    return ""
