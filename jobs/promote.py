"""Promote a model: hold its evaluation report against gates; where all pass, make a release and move an alias to it.

    python -m jobs.promote model=<uri> report=<uri> [registry=runs/registry] [gates=shapes] [alias=production]

The last line printed is the decision as JSON. Exit code 0: promoted; 2: refused, invalid, or a mistake in the settings.
"""

from __future__ import annotations

import sys

from latentray.config import command
from latentray.config.promote import PromoteConfig
from latentray.interchange import resolving
from latentray.registry import promotion


def promote(config: PromoteConfig) -> str:
    return promotion.promote(resolving.resolved(config, {"model": "model"}))


def main() -> int:
    return command.run("promote", PromoteConfig, promote)


if __name__ == "__main__":
    sys.exit(main())
