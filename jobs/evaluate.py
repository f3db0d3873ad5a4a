"""Measure a model folder: held-out loss, FID, KID and, for shapes, what the pictures show; or a policy's success.

python -m jobs.evaluate model=runs/my-model/model data=runs/data/shapes
python -m jobs.evaluate model=stabilityai/stable-diffusion-2-1-base data=runs/data/photos
python -m jobs.evaluate suite=failures model=runs/my-model/model data=runs/data/shapes samples=54
python -m jobs.evaluate suite=clips model=runs/my-video/model data=runs/data/moving
python -m jobs.evaluate suite=policy model=runs/my-policy/model baseline=runs/my-regression/model
"""

import dataclasses
import sys

from latentray.checkpoint import store
from latentray.config import command
from latentray.config.evaluate import Evaluate
from latentray.evaluation import clip_suite, failure_suite, policy_suite, suite
from latentray.interchange import resolving

SUITES = {
    "standard": suite.evaluate,
    "failures": failure_suite.evaluate,
    "clips": clip_suite.evaluate,
    "policy": policy_suite.evaluate,
}


def evaluate(config: Evaluate) -> str:
    """Run the suite that `suite` names; the URI of what it wrote: of a model that others made, below runs/."""
    found = resolving.resolved(config, {"model": "model", "baseline": "model"})
    if config.model and found.model != config.model and not config.out:
        found = dataclasses.replace(found, out=store.join("runs", resolving.name_of(config.model), "report"))
    return SUITES[config.suite](found)


def main() -> int:
    return command.run("evaluate", Evaluate, evaluate)


if __name__ == "__main__":
    sys.exit(main())
