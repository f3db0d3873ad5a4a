"""What travels between the ingress and the sampler: plain values, so that the ingress needs no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawn picture, or clip."""

    pixels_HWC: np.ndarray
    """uint8 RGB; a clip's (T,H,W,3)."""
    truncated: bool
    """The prompt was longer than the tokenizer takes."""
    release_id: str
    """Release that drew it: a promotion may happen after a request was admitted, even between two of its pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The next actions of one robot."""

    actions_TA: np.ndarray
    """float32, in the units of the data that the policy learnt from."""
    release_id: str
    """Release that made it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyInfo:
    """What a policy is told and says."""

    observations: dict[str, int]
    """Name -> numbers of one observation."""
    observation_steps: int
    """How many of the latest observations it is told."""
    action_steps: int
    action_width: int
    executed: int
    """Actions to execute before it is asked again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What the ingress needs to know of the loaded release: its names, bounds and defaults."""

    release_id: str
    release: str
    """URI."""
    created: int
    """Unix time of the release, seconds."""
    size: int
    """Native height and width, pixels."""
    downsampling: int
    """Heights and widths are multiples of it."""
    samplers: tuple[str, ...]
    max_steps: int
    sampler: str
    """Default sampler."""
    steps: int
    """Default number of steps."""
    guidance_scale: float
    """Default guidance scale."""
    frames: int = 0
    """Of the clips it learnt from; 0 for a model of pictures."""
    fps: float = 0.0
    """Frames per second of its clips."""
    policy: PolicyInfo | None = None
    """Of a model that gives actions; it has no size and no guidance."""
    takes_like: bool = False
    """Whether it has a vision encoder, for variations of pictures."""
    classes: int | None = None
    """How many classes it draws, or its classifier draws to; None where neither knows any."""
    class_names: tuple[str, ...] = ()
    """Theirs, in their order, where they have names."""
    has_classifier: bool = False
    """Whether a classifier of noisy latents draws to the class that a request names."""
    makes_larger: int = 0
    """The factor of a super-resolution model; 0 for others."""
    takes_mask: bool = False
    """Whether it was trained for inpainting; other models of pictures inpaint too, and know less of what is around."""
    refused: tuple[str, str] | None = None
    """Id of a release that was to replace this one and could not, and why."""

    @property
    def what(self) -> str:
        """What the model is, as a refusal tells it."""
        if self.policy is not None:
            return "a policy, which gives actions"
        if self.makes_larger:
            return f"a super-resolution model, which makes pictures {self.makes_larger} times larger"
        drawn = "an inpainting model" if self.takes_mask else f"a model of {'clips' if self.frames else 'pictures'}"
        return drawn if self.classes is None else f"{drawn} of {self.classes} classes"

    @property
    def conditions(self) -> tuple[str, ...]:
        """The fields of a request, besides its prompts, that say what is to be drawn."""
        changes = not self.frames and self.policy is None
        taken = {
            "label": self.classes is not None,
            "like": self.takes_like,
            "image": changes,
            "mask": changes and not self.makes_larger,
        }
        return tuple(name for name, is_taken in taken.items() if is_taken)

    def public(self) -> dict[str, Any]:
        """What `GET /v1/models` tells clients besides OpenAI's fields."""
        if self.policy is not None:
            return {
                "release": self.release_id,
                "samplers": list(self.samplers),
                "max_steps": self.max_steps,
                "defaults": {"sampler": self.sampler, "num_inference_steps": self.steps},
            } | dataclasses.asdict(self.policy)
        return {
            "release": self.release_id,
            "size": f"{self.size}x{self.size}",
            "size_multiple_of": self.downsampling,
            "conditions": list(self.conditions),
            "samplers": list(self.samplers),
            "max_steps": self.max_steps,
            "defaults": {
                "sampler": self.sampler,
                "num_inference_steps": self.steps,
                "guidance_scale": self.guidance_scale,
            },
        } | {name: value for name, value in self._more().items() if value}

    def _more(self) -> dict[str, Any]:
        """What only some models have."""
        of_clips = {"frames": self.frames, "fps": self.fps}
        of_pictures = {"inpainting": self.takes_mask, "super_resolution": self.makes_larger, "like": self.takes_like}
        of_pictures["classifier"] = self.has_classifier
        return of_clips | {"classes": self.classes, "class_names": list(self.class_names)} | of_pictures
