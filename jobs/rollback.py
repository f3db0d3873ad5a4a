"""Move an alias back to the release it pointed to before, after every file of that release was verified.

    python -m jobs.rollback [registry=runs/registry] [alias=production]

The last line printed is JSON with the alias and the release it points to now.
"""

from __future__ import annotations

import json
import sys

from latentray.config import command
from latentray.config.promote import RollbackConfig
from latentray.registry import versions


def rollback(config: RollbackConfig) -> None:
    release = versions.rollback(config.registry, config.alias)
    print(f"{config.alias} is {release} again: {versions.release_uri(config.registry, release)}")
    print(f"next: python -m jobs.releases registry={config.registry}")
    print(json.dumps({"alias": config.alias, "release": release}))


def main() -> int:
    return command.run("rollback", RollbackConfig, rollback)


if __name__ == "__main__":
    sys.exit(main())
