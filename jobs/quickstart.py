"""Pixels to endpoint: draw the shapes set, train both stages, evaluate, promote, serve, and write a report with pictures.

python -m jobs.quickstart                    # or: make quickstart
python -m jobs.quickstart scale=mini         # in miniature
python -m jobs.quickstart keep_serving=true serve.port=8001
"""

import sys

from jobs.quickstart_stages import quickstart
from latentray.config import command
from latentray.config.quickstart import Quickstart


def main() -> int:
    return command.run("quickstart", Quickstart, quickstart)


if __name__ == "__main__":
    sys.exit(main())
