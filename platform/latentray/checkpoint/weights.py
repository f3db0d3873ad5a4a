"""State dicts as safetensors: the only weight format that leaves training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from latentray.errors import ArtifactError, WeightsMismatch


def save(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict; tensors are made contiguous and moved to the CPU."""
    safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path)


def read(path: Path) -> dict[str, Tensor]:
    """Read a state dict. Raises ArtifactError where the file is no safetensors file."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from None


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a state dict, from the file's head alone. Raises as `read` does."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"The weights cannot be read: {error}", where=str(path), mend="Make the artifact again.")


def load_into(module: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Load a state dict exactly. Raises WeightsMismatch naming the first key that differs, both shapes, and how many more."""
    own, given = ({k: tuple(v.shape) for k, v in one.items()} for one in (module.state_dict(), state))
    require_shapes(own, given, where=where)
    module.load_state_dict(dict(state))


def require_shapes(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Raise WeightsMismatch as `load_into` does, from the shapes by key that an architecture has, and those it is given."""
    wrong = [key for key in own if given.get(key) != own[key]] + [key for key in given if key not in own]
    if wrong:
        key = wrong[0]
        wanted, got = own.get(key, "no such key"), given.get(key, "missing")
        raise WeightsMismatch(
            f"The weights do not fit the architecture: {key} is {got}, wanted {wanted}; {len(wrong) - 1} more differ.",
            where=where,
            mend="Use the configuration these weights were trained with.",
        )
