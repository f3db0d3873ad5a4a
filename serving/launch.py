"""Start the endpoint from a driver: checks first, then a cluster, then the application, and a clean end."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from latentray.checkpoint import store
from latentray.config.serve import ServeConfig
from latentray.errors import ArtifactError, EnvironmentRefused, LatentrayError
from serving import app, keys
from serving.greeting import greeting
from serving.loading import require_settings
from serving.releases import Release, find_release, verify

_POLL_S = 0.25
_PROXY_GRACE_S = 5.0
"""How much later than the ingress's own timeout, which answers in OpenAI's form, Serve's proxy gives up."""
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclasses.dataclass(kw_only=True)
class Endpoint:
    """A running endpoint."""

    base_url: str
    """`http://host:port`; clients of OpenAI's API append `/v1`."""
    config: ServeConfig
    first: Release
    """The release it was started with."""
    release: Release
    """The release in service."""
    _owns_serve: bool
    _owns_ray: bool

    def roll_out(self, release: Release) -> None:
        """Put another release in service, in place, and return once it answers.

        Raises ArtifactError where it is damaged or cannot draw, ConfigError where the settings do not fit it; the one in
        service before stays.
        """
        verify(release)
        require_settings(self.config, release.uri)
        _deploy(self.config, first=self.first, release=release)
        refusal = _wait_for_release(release, self.config)
        if refusal is not None:
            _deploy(self.config, first=self.first, release=self.release)  # else new replicas would try the refused one
            raise ArtifactError(
                f"The release cannot be served, {self.release.id} stays: {refusal}",
                where=release.uri,
                mend="Evaluate and promote another model.",
            )
        self.release = release

    def stop(self) -> None:
        """Take the endpoint down, with the Serve instance and the cluster where `serve` started them."""
        if not ray.is_initialized():
            return
        if self._owns_serve:
            ray_serve.shutdown()
        else:
            ray_serve.delete(app.NAME)
        if self._owns_ray:
            ray.shutdown()


def serve(config: ServeConfig, block: bool = True) -> Endpoint:
    """Serve a release. With `block`, until SIGINT or SIGTERM; else the caller stops the endpoint it gets.

    Raises, before a cluster starts: EnvironmentRefused for a port in use or a missing key, InputMissing or
    ArtifactError for a release that is missing or damaged, ConfigError for settings that do not fit it.
    """
    hashes = keys.collect(config)
    registry = None if config.release else config.registry  # an alias names nothing where the release is given itself
    classifier = None if config.classifier is None else store.absolute(config.classifier)
    config = dataclasses.replace(config, key_hashes=hashes, keys_file=None, registry=registry, classifier=classifier)
    keys.require(config, config.key_hashes)
    release = find_release(config)
    verify(release)
    require_settings(config, release.uri)
    if _is_local(config):
        require_free_port(config.host, config.port)

    owns_ray = not ray.is_initialized()
    if owns_ray:
        # Serve's processes inherit it: their logs go to files, and this terminal shows what `serve` prints.
        os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
        from latentray.data import cluster  # here, since it is the only part of serving that a replica never needs

        cluster.connect(config.address)
    owns_serve = False
    try:
        owns_serve = _start_proxy(config)
        endpoint = Endpoint(
            base_url=base_url(config),
            config=config,
            first=release,
            release=release,
            _owns_serve=owns_serve,
            _owns_ray=owns_ray,
        )
        _deploy(config, first=release, release=release)
        _wait_until_ready(endpoint)
    except BaseException:
        if owns_serve:
            ray_serve.shutdown()
        if owns_ray:
            ray.shutdown()
        raise
    print(greeting(endpoint.base_url, release, with_key=bool(config.key_hashes)), flush=True)
    if block:
        try:
            wait_for_signal(endpoint)
        finally:
            endpoint.stop()
    return endpoint


def require_free_port(host: str, port: int) -> None:
    """Raise EnvironmentRefused where something listens on the port already, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentRefused(
                f"Port {port} cannot be used: {error.strerror}.",
                where=f"{host}:{port}",
                mend="Stop what listens there, or take another port with port=... (and host=...).",
            ) from None


def _is_local(config: ServeConfig) -> bool:
    """Whether Ray is started here; a cluster given by address brings its own code (`jobs.submit` ships it)."""
    return not (config.address or os.environ.get("RAY_ADDRESS"))


def base_url(config: ServeConfig) -> str:
    """Where a client on this machine reaches the endpoint."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def deploy_schema(config: ServeConfig, *, first: Release, release: Release) -> dict[str, Any]:
    """The Serve config (as a file or RayService would hold it) that puts `release` in service.

    `args` keep naming the release the application was first built with: only `user_config` changes with a promotion, so
    that Serve reconfigures replicas in place and replaces none.
    """
    # Serve's own processes import `serving.app` from here; an installed package is found without.
    root = Path(__file__).resolve().parents[1]
    paths = [str(root), str(root / "platform"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}} if _is_local(config) else {}
    args = dataclasses.asdict(config) | {"release": first.uri}
    return {
        "applications": [
            {
                "name": app.NAME,
                "route_prefix": "/",
                "import_path": "serving.app:build",
                "runtime_env": runtime_env,
                "args": args,
                "deployments": [{"name": "Sampler", "user_config": release.user_config()}],
            }
        ]
    }


def _start_proxy(config: ServeConfig) -> bool:
    """Start Serve's HTTP proxy; False where the cluster runs Serve already, on the port wanted."""
    running = _client(required=False)
    if running is not None:
        found = running.http_config.port
        if found != config.port:
            raise EnvironmentRefused(
                f"Ray Serve runs on this cluster already, on port {found}.",
                where=f"port={config.port}",
                mend=f"Set port={found}, or shut that Serve instance down first.",
            )
        return False
    ray_serve.start(
        proxy_location="EveryNode",
        http_options={
            "host": config.host,
            "port": config.port,
            "request_timeout_s": config.request_timeout_s + _PROXY_GRACE_S,
        },
    )
    return True


def _client(*, required: bool) -> Any:
    """Serve's controller client: what `serve deploy` reaches through the dashboard, which a local cluster may lack."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=required)


def _deploy(config: ServeConfig, *, first: Release, release: Release) -> None:
    schema = ServeDeploySchema.model_validate(deploy_schema(config, first=first, release=release))
    _client(required=True).deploy_apps(schema)


def cause_of(messages: Sequence[str]) -> str:
    """The line that says why: Serve's messages end in a replica's traceback, whose last line is the error itself."""
    ends = [text.strip().splitlines()[-1].strip() for text in messages if text.strip()]
    named = [end for end in ends if re.match(r"[\w.]*(Error|Exception|Refused|Missing|Mismatch)\b", end)]
    return next(iter(named or ends), "")


def _wait_until_ready(endpoint: Endpoint) -> None:
    """Wait for /readyz. Raises EnvironmentRefused where the application fails to start or takes too long."""
    deadline = time.monotonic() + endpoint.config.start_timeout_s
    message = ""
    while time.monotonic() < deadline:
        found = ray_serve.status().applications.get(app.NAME)
        if found is not None:
            message = cause_of([*(d.message for d in found.deployments.values()), found.message])
            if found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise EnvironmentRefused(
                    f"The endpoint did not start: {message}",
                    where=endpoint.base_url,
                    mend="See the cause above.",
                )
            if found.status is ApplicationStatus.RUNNING and _answers(endpoint.base_url + "/readyz"):
                return
        time.sleep(_POLL_S)
    raise EnvironmentRefused(
        f"The endpoint was not ready after {endpoint.config.start_timeout_s:g} s. {message}",
        where=endpoint.base_url,
        mend="Give it longer with start_timeout_s=..., or see the cluster's free CPUs and GPUs (num_cpus, num_gpus).",
    )


def _wait_for_release(release: Release, config: ServeConfig) -> str | None:
    """Wait until the samplers serve a release; the reason where one of them refuses it."""
    handle = ray_serve.get_deployment_handle("Sampler", app.NAME)
    deadline = time.monotonic() + config.start_timeout_s
    agreed = 0  # answers in a row: replicas are asked at random, and change one after the other
    while agreed < 3 * config.max_replicas:
        try:
            info = handle.info.remote().result(timeout_s=config.request_timeout_s)
        except (BackPressureError, TimeoutError):
            info = None  # busy
        if info is not None and info.refused is not None and info.refused[0] == release.id:
            return info.refused[1]
        if info is not None and info.release_id == release.id:
            agreed += 1
            continue
        agreed = 0
        if time.monotonic() > deadline:
            return f"not in service after {config.start_timeout_s:g} s"
        time.sleep(_POLL_S)
    return None


def _answers(url: str) -> bool:
    try:
        with _direct.open(url, timeout=10) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def wait_for_signal(endpoint: Endpoint) -> None:
    """Block until SIGINT or SIGTERM; meanwhile follow the alias."""
    done = threading.Event()
    before = {number: signal.signal(number, lambda *_: done.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    refused = ""
    try:
        # a release given itself never changes
        period = None if endpoint.config.release else endpoint.config.follow_s or None
        while not done.wait(period):
            refused = follow(endpoint, refused=refused)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(endpoint: Endpoint, *, refused: str = "") -> str:
    """Put in service what the alias names now; returns the id of a release that cannot be served, not to retry it.

    An unreadable registry or a damaged release never takes down the release in service.
    """
    try:
        wanted = find_release(endpoint.config)
    except (LatentrayError, OSError) as error:
        print(f"The alias cannot be read: {error}", file=sys.stderr, flush=True)
        return refused
    if wanted.id in (endpoint.release.id, refused):
        return refused
    try:
        endpoint.roll_out(wanted)
    except (LatentrayError, OSError) as error:
        print(error, file=sys.stderr, flush=True)
        return wanted.id
    print(f"Serving {wanted.id} now.", flush=True)
    return ""
