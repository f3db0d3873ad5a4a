"""Measure a model folder: held-out loss, FID, KID and, for shapes, what the pictures show; or a policy's success.

python -m jobs.evaluate model=runs/my-model/model data=runs/data/shapes
python -m jobs.evaluate suite=failures model=runs/my-model/model data=runs/data/shapes samples=54
python -m jobs.evaluate suite=clips model=runs/my-video/model data=runs/data/moving
python -m jobs.evaluate suite=policy model=runs/my-policy/model baseline=runs/my-regression/model
"""

import sys

from latentray.config import command
from latentray.config.evaluate import Evaluate
from latentray.evaluation import clip_suite, failure_suite, policy_suite, suite

SUITES = {
    "standard": suite.evaluate,
    "failures": failure_suite.evaluate,
    "clips": clip_suite.evaluate,
    "policy": policy_suite.evaluate,
}


def evaluate(config: Evaluate) -> str:
    """Run the suite that `suite` names; the URI of what it wrote."""
    return SUITES[config.suite](config)


def main() -> int:
    return command.run("evaluate", Evaluate, evaluate)


if __name__ == "__main__":
    sys.exit(main())
