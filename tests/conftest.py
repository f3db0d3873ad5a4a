"""Shared fixtures: one local Ray cluster, one S3 server, and an environment in which no test leaves this machine.

Set before anything imports ray, torch or transformers; the processes that tests start inherit it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "MPLBACKEND": "Agg",
    # No network: no hub, no tracking server, no instance metadata.
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "AWS_EC2_METADATA_DISABLED": "true",
    # A cluster of our own: with a token that lives as long as the tests, instead of one written to the home folder.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # Ray Train looks after its workers every 2 s by default, which is most of a small test's time.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # Workers find the package in this checkout, whatever is installed.
    "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
}
os.environ.update(ENVIRONMENT)
for _name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "LATENTRAY_CONF", "AWS_PROFILE", "WANDB_API_KEY"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """Remote files are cached in a folder of this session, never in the user's."""
    folder = tempfile.mkdtemp(prefix="lr-cache-")
    os.environ["LATENTRAY_CACHE"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_linear() -> Iterator[None]:
    """ZeRO 3 leaves its `linear` in torch, which computes otherwise than torch's under autocast: no other test meets it."""
    torch = sys.modules.get("torch")
    before = torch.nn.functional.linear if torch is not None else None
    yield
    if torch is not None:
        torch.nn.functional.linear = before


@pytest.fixture(scope="module", autouse=True)
def no_cluster_is_left() -> Iterator[None]:
    """A file that starts Ray ends it too: what it left would meet the next file's cluster."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("this file left a Ray cluster running")


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """A local Ray cluster for the tests of one file: 4 logical CPUs, no dashboard. Mark its tests `cluster`.

    Tests share it, so they leave no actors, placement groups or Serve applications behind.
    """
    import ray

    folder = tempfile.mkdtemp(prefix="lr-")  # short: Ray's socket paths are limited to about 100 characters
    ray.init(
        num_cpus=4,
        object_store_memory=128 * 2**20,
        include_dashboard=False,
        _temp_dir=folder,
        log_to_driver=True,
        logging_level="warning",
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class S3:
    """A bucket of the session's S3 server."""

    endpoint: str
    bucket: str

    def uri(self, *parts: str) -> str:
        return "/".join([f"s3://{self.bucket}", *parts])


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def moto_s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A fresh, empty S3 bucket on loopback, reached through the usual AWS_* variables (set for this test).

    Processes of `ray_local` that started before do not see the variables: hand them on with `runtime_env` env_vars.
    """
    for name, value in {
        "AWS_ENDPOINT_URL": _s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",  # pragma: allowlist secret
        "AWS_SESSION_TOKEN": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = f"bucket-{secrets.token_hex(4)}"
    boto3.client("s3", endpoint_url=_s3_server, region_name="us-east-1").create_bucket(Bucket=bucket)
    return S3(endpoint=_s3_server, bucket=bucket)
