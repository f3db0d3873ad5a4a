"""Serve the release an alias points to, behind OpenAI's images API, until interrupted.

    python -m jobs.serve registry=runs/registry alias=production keys_file=keys.sha256
    python -m jobs.serve release=runs/quickstart/model allow_anonymous=true          # this machine only
    python -m jobs.serve release=stabilityai/stable-diffusion-2-1-base allow_anonymous=true   # or a diffusers folder
    python -m jobs.serve registry=... keys_file=... classifier=runs/my-classifier/classifier   # a request's label is drawn to
    python -m jobs.serve registry=... keys_file=... num_gpus=1 offload=true           # a model larger than the GPU's memory

Where the alias moves (`python -m jobs.promote`, `jobs.rollback`), the running endpoint follows without a restart.

Clients send `Authorization: Bearer <key>`; the server keeps only sha256 hashes of keys. The command prints a `curl`
that works once the endpoint is ready, and stops cleanly on Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import sys

from latentray.config import command
from latentray.config.serve import ServeConfig
from latentray.errors import ConfigError
from latentray.interchange import resolving
from serving import launch

_MODELS = {"release": "model", "classifier": "classifier"}
"""The settings that name models, and what each has to be."""


def serve(config: ServeConfig) -> launch.Endpoint:
    """Serve what the settings name: of a model that others made, the artifact that is made of it here.

    Raises ConfigError, before anything is made, for such a model on a cluster that is given: its replicas need not see this
    machine's cache, and a service should not begin with a conversion on each of their nodes.
    """
    is_given = config.address or os.environ.get("RAY_ADDRESS")
    for name in _MODELS:
        source = getattr(config, name)
        if is_given and source and resolving.is_others(source):
            raise ConfigError(
                "It would become an artifact in this machine's cache, which the replicas of a given cluster need not see.",
                where=f"{name}={source}",
                mend=f"Import it to where they do: python -m jobs.import_weights weights={source} out=<URI>; give that.",
            )
    return launch.serve(resolving.resolved(config, _MODELS))


def main() -> int:
    return command.run("serve", ServeConfig, serve)


if __name__ == "__main__":
    sys.exit(main())
