"""A policy as a replica holds it: loaded through its manifest, tried once, and planning for many robots in one call."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentray.checkpoint import manifest
from latentray.checkpoint.manifest import Manifest
from latentray.config.serve import ServeConfig
from latentray.errors import RequestRefused
from latentray.inference.requests import ActionRequest
from serving.messages import ModelInfo, Plan, PolicyInfo

if TYPE_CHECKING:
    from latentray.inference.acting import ActionSampler

logger = logging.getLogger("ray.serve")

_CONFIG = "config.json"


def is_policy(uri: str, found: Manifest) -> bool:
    """Whether a release gives actions."""
    return _CONFIG in found.files and "policy" in json.loads(manifest.fetch_file(uri, _CONFIG, found).read_text())


def load(config: ServeConfig, uri: str, release_id: str, *, created: int) -> LoadedPolicy:
    """Load a policy; every file is verified by the manifest."""
    from latentray.inference.acting import ActionSampler  # here, for the ingress has no torch

    sampler = ActionSampler.load(uri, device=config.device)
    net = sampler.model.config
    info = ModelInfo(
        release_id=release_id,
        release=uri,
        created=created,
        size=0,
        downsampling=1,
        samplers=sampler.samplers,
        max_steps=sampler.max_steps,
        sampler=sampler.defaults.sampler,
        steps=sampler.defaults.steps,
        guidance_scale=1.0,
        policy=PolicyInfo(
            observations=sampler.model.widths,
            observation_steps=net.observation_steps,
            action_steps=net.action_steps,
            action_width=net.in_channels,
            executed=sampler.model.executed,
        ),
    )
    return LoadedPolicy(sampler=sampler, info=info, threads=config.threads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy and what is said about it."""

    sampler: ActionSampler
    info: ModelInfo
    threads: int | None

    def warm_up(self) -> None:
        """Plan once, in the thread that will plan: a release that cannot never serves."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        policy = self.info.policy
        assert policy is not None
        request = ActionRequest(
            observations={
                n: np.zeros((policy.observation_steps, w), np.float32) for n, w in policy.observations.items()
            },
            seed=0,
            sampler=self.info.sampler,
            steps=self.info.steps,
        )
        (outcome,) = self.draw([request])
        if isinstance(outcome, Exception):
            raise outcome

    def draw(self, requests: Sequence[Any]) -> list[Plan | Exception]:
        """One outcome per request, in order, all in one call.

        Where it fails, they are tried one by one, so that a request fails for its own faults only.
        """
        outcomes: list[Plan | Exception] = [RequestRefused("The model gives actions now.", param="model")] * len(
            requests
        )
        rows = [i for i, request in enumerate(requests) if isinstance(request, ActionRequest)]
        for i, outcome in zip(rows, self._plan([requests[i] for i in rows]), strict=True):
            outcomes[i] = outcome
        return outcomes

    def _plan(self, requests: list[ActionRequest]) -> list[Plan | Exception]:
        if not requests:
            return []
        try:
            plans = self.sampler.act(requests)
        except Exception as error:
            if len(requests) == 1:
                logger.exception("actions could not be planned")
                return [error]
            return [outcome for request in requests for outcome in self._plan([request])]
        return [Plan(actions_TA=actions, release_id=self.info.release_id) for actions in plans]
