"""Observations -> actions, for evaluation, the shell and the endpoint alike: the same tables and executor as for pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from latentray import build, randomness
from latentray.conditioning.denoiser_inputs import told
from latentray.conditioning.observations import OBS, together
from latentray.diffusion import executor, samplers, schedules
from latentray.diffusion.executor import Table
from latentray.errors import ConfigError
from latentray.inference import policy_folder
from latentray.inference.model_folder import SamplingDefaults
from latentray.inference.policy_folder import PolicyModel
from latentray.inference.requests import ActionRequest
from latentray.randomness import Purpose
from latentray.records import Conditions

__all__ = ["ActionRequest", "ActionSampler"]


class ActionSampler:
    """A policy ready to act.

    The same request gives the same actions whatever else is in the batch, up to the rounding of another batch size.
    """

    def __init__(self, model: PolicyModel, *, device: str = "auto") -> None:
        self.device = build.device(device)
        self.model = model
        self.schedule = schedules.build(model.objective)
        # float32: a robot's position has more digits than bf16 keeps, and the network is small.
        self.denoiser = model.denoiser.to(self.device)

    @classmethod
    def load(cls, uri: str, *, device: str = "auto") -> ActionSampler:
        """Load a policy's model or release folder, verified by its manifest."""
        return cls(policy_folder.load(uri), device=device)

    @property
    def defaults(self) -> SamplingDefaults:
        return self.model.defaults

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names of the samplers that fit this model's schedule."""
        return samplers.names(self.schedule)

    @property
    def max_steps(self) -> int:
        return self.schedule.timesteps

    def check(self, request: ActionRequest) -> None:
        """Raises ConfigError, as `act` would, without acting: it names the observation, or the setting."""
        self._require_observations(request.observations)
        self._table(request)

    @torch.inference_mode()
    def act(self, requests: Sequence[ActionRequest]) -> list[np.ndarray]:
        """The next actions of each request, float32 (T, A), T = denoiser.action_steps.

        Raises ConfigError for observations of other names or shapes, or a sampler that does not fit.
        """
        for request in requests:
            self._require_observations(request.observations)
        tables = [self._table(request) for request in requests]
        seeds = [request.seed for request in requests]
        shape = (self.model.config.action_steps, self.model.config.in_channels)
        noise = randomness.normal(randomness.keys_from_seeds(seeds, Purpose.INITIAL_LATENT), shape).to(self.device)
        begins = torch.tensor([float(one.sigma > 0) for one in tables], device=self.device)  # no noise, no draw
        heard = told(self.model.config, Conditions(observations_BTD=self._normalised(requests)))

        def network(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return heard.rows(rows).call(self.denoiser, x, t)

        def fresh_noise(rows: Sequence[int], row: int) -> Tensor:
            keys = randomness.keys_from_seeds([seeds[i] for i in rows], Purpose.SAMPLER_NOISE, counter=row)
            return randomness.normal(keys, shape)

        x = executor.execute(tables, noise * begins[:, None, None], network, fresh_noise)
        return list(self.model.actions.restored(x.cpu().numpy()))

    def _normalised(self, requests: Sequence[ActionRequest]) -> Tensor:
        """(B, To, D) of all observations, as in training."""
        ranges = self.model.ranges
        rows = [
            together(
                self.model.observations,
                {name: ranges[f"{OBS}{name}"].normalised(values) for name, values in request.observations.items()},
            )
            for request in requests
        ]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _require_observations(self, observations: Mapping[str, np.ndarray]) -> None:
        steps, widths = self.model.config.observation_steps, self.model.widths
        for name in sorted(widths.keys() ^ observations.keys()):
            what = f"The policy is told {name!r}." if name in widths else f"The policy is not told {name!r}."
            raise ConfigError(what, where=f"observations.{name}", mend=f"Give {', '.join(widths)}, and nothing else.")
        for name, width in widths.items():
            values = np.asarray(observations[name])
            if values.shape != (steps, width):
                raise ConfigError(
                    f"{name} has the shape {values.shape}, not ({steps}, {width}).",
                    where=f"observations.{name}",
                    mend=f"Give the latest {steps} observations of {width} numbers, the newest last.",
                )
            if not np.isfinite(values).all():
                raise ConfigError(f"{name} is not finite.", where=f"observations.{name}", mend="Give numbers.")

    def _table(self, request: ActionRequest) -> Table:
        return samplers.table(
            request.sampler,
            self.schedule,
            self.model.objective.prediction,
            request.steps,
            spacing_name=request.spacing,
            bound=request.bound,
            eta=request.eta,
            order=request.order,
        )
