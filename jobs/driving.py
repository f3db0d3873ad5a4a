"""What `python -m jobs.sample episodes=100` does of a policy: its ways through the built-in environment, and its success."""

from __future__ import annotations

import json

import numpy as np

from latentray.config import compose
from latentray.config.sample import Sample
from latentray.errors import ConfigError
from latentray.evaluation import rollouts
from latentray.evaluation.rollouts import Settings
from latentray.inference.acting import ActionSampler
from latentray.reporting import pictures, trajectories


def drive(config: Sample, uri: str) -> str:
    """Drive a policy through `episodes` scenes, draw some of its ways, and return the path of the PNG.

    Raises ArtifactError for a model that is no policy, ConfigError for settings that do not fit it.
    """
    if not config.out.endswith(".png"):
        raise ConfigError("Ways are drawn as a picture.", where="out", mend="End it in .png.")
    model = ActionSampler.load(uri, device=config.device)
    own = rollouts.defaults(model)
    settings = Settings(
        sampler=config.sampler or own.sampler,
        steps=own.steps if config.steps is None else config.steps,
        executed=own.executed,
    )
    seeds = rollouts.scene_seeds(config.seed, config.episodes)
    figures = rollouts.figures(rollouts.run(model, settings, seeds), seeds)
    sheet = trajectories.picture(rollouts.sheet({"policy": (model, settings)}, seed=config.seed))
    about = compose.to_dict(config) | {"model": model.model.digest, "figures": figures}
    pictures.save_png(np.asarray(sheet), config.out, {"parameters": json.dumps(about, sort_keys=True)})
    success, error = figures["policy.success"], figures["policy.success_standard_error"]
    print(f"success {success:.3f} +- {error:.3f} over {config.episodes} episodes: {config.out}", flush=True)
    return config.out
