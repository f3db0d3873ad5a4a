"""State dicts as safetensors: the only weight format that leaves training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from latentray.errors import ArtifactError


def save(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict; tensors are made contiguous and moved to the CPU."""
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path)


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict. Raises ArtifactError where the file is no safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ArtifactError(
            f"The weights cannot be read: {error}", where=str(path), mend="Make the artifact again."
        ) from None


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Load a state dict exactly. Raises ArtifactError naming the first key that differs, both shapes, and how many more."""
    own = module.state_dict()
    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape] + [k for k in state if k not in own]
    if wrong:
        key = wrong[0]
        wanted = tuple(own[key].shape) if key in own else "no such key"
        got = tuple(state[key].shape) if key in state else "missing"
        raise ArtifactError(
            f"The weights do not fit the architecture: {key} is {got}, wanted {wanted}; {len(wrong) - 1} more differ.",
            where=where,
            mend="Use the configuration these weights were trained with.",
        )
    module.load_state_dict(dict(state))
