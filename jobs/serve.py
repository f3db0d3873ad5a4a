"""Serve the release an alias points to, behind OpenAI's images API, until interrupted.

    python -m jobs.serve registry=runs/registry alias=production keys_file=keys.sha256
    python -m jobs.serve release=runs/quickstart/model allow_anonymous=true          # this machine only

Where the alias moves (`python -m jobs.promote`, `jobs.rollback`), the running endpoint follows without a restart.

Clients send `Authorization: Bearer <key>`; the server keeps only sha256 hashes of keys. The command prints a `curl`
that works once the endpoint is ready, and stops cleanly on Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import sys

from latentray.config import command
from latentray.config.serve import ServeConfig
from serving.launch import serve


def main() -> int:
    return command.run("serve", ServeConfig, serve)


if __name__ == "__main__":
    sys.exit(main())
