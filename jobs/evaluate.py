"""Measure a model folder: held-out loss, FID, KID and, for shapes, what the pictures show.

python -m jobs.evaluate model=runs/my-model/model data=runs/data/shapes
"""

import sys

from latentray.config import command
from latentray.config.evaluate import Evaluate
from latentray.evaluation import suite


def main() -> int:
    return command.run("evaluate", Evaluate, suite.evaluate)


if __name__ == "__main__":
    sys.exit(main())
