"""`serving.app:build`: the Ray Serve application, for `jobs.serve` and Serve config files (KubeRay's serveConfigV2).

    applications:
      - name: latentray
        route_prefix: /
        import_path: serving.app:build
        args: {registry: "s3://models/registry", alias: production, keys_file: "s3://models/keys.sha256", host: 0.0.0.0}
        deployments:
          - name: Sampler
            user_config: {release: "s3://models/registry/releases/<id>", release_id: "<id>"}

`args` are the keys of `latentray.config.serve.ServeConfig`. A promotion changes `user_config` alone: Serve then loads
the new release in place. Without it the release is the one the alias points to when the application is built.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import pydantic
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError
from serving import keys, refusals
from serving.deployments import Ingress, Sampler
from serving.loading import require_settings
from serving.releases import find_release

NAME = "latentray"
"""Name of the Serve application."""
INGRESS_ONGOING = 256
"""Requests one ingress replica handles at a time; nearly all of them wait for a sampler."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application for a set of settings. Raises ConfigError, or EnvironmentRefused without a key."""
    config = config_of(args)
    hashes = keys.collect(config)
    keys.require(config, hashes)
    release = find_release(config)
    require_settings(config, release.uri)
    sampler = serve.deployment(
        Sampler,
        name="Sampler",
        user_config=release.user_config(),
        max_ongoing_requests=config.max_ongoing_requests,
        max_queued_requests=config.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=refusals.RETRY_AFTER_S),
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
        ),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
    )
    ingress = serve.deployment(
        Ingress,
        name="Ingress",
        max_ongoing_requests=INGRESS_ONGOING,
        max_queued_requests=INGRESS_ONGOING,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=refusals.RETRY_AFTER_S),
        ray_actor_options={"num_cpus": 0},  # little work beside drawing; a one-CPU machine must still fit a sampler
    )
    return ingress.bind(config, hashes, sampler.bind(config))


def config_of(args: dict[str, Any]) -> ServeConfig:
    """Serve's `args` as a checked ServeConfig. Raises ConfigError naming the key."""
    known = [field.name for field in dataclasses.fields(ServeConfig)]
    for key in args:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            mend = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
            raise ConfigError(f"There is no setting {key!r}.", where="args", mend=mend)
    try:
        return pydantic.TypeAdapter(ServeConfig).validate_python(args)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{key}: {first['msg']}", where="args", mend="See latentray/config/serve.py for the keys."
        ) from None
