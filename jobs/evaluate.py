"""Measure a model folder: held-out loss, FID, KID and, for shapes, what the pictures show.

python -m jobs.evaluate model=runs/my-model/model data=runs/data/shapes
python -m jobs.evaluate suite=failures model=runs/my-model/model data=runs/data/shapes samples=54
"""

import sys

from latentray.config import command
from latentray.config.evaluate import Evaluate
from latentray.evaluation import failure_suite, suite

SUITES = {"standard": suite.evaluate, "failures": failure_suite.evaluate}


def evaluate(config: Evaluate) -> str:
    """Run the suite that `suite` names; the URI of what it wrote."""
    return SUITES[config.suite](config)


def main() -> int:
    return command.run("evaluate", Evaluate, evaluate)


if __name__ == "__main__":
    sys.exit(main())
