"""What reading and writing another library's layout takes: its settings against those known here, and renamed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from latentray.errors import ArtifactError, ConfigError

Described = dict[str, Any]
"""What stands in the other library's config.json."""
State = dict[str, Tensor]


def told(known: Described, described: Mapping[str, Any], *, of: str) -> Described:
    """The library's defaults under what a config.json says. Raises ConfigError for a setting that is not known here.

    Args:
        of: the networks whose settings are known, for the error.
    """
    given = {key: value for key, value in described.items() if not key.startswith("_")}
    for field in given:
        if field not in known:
            raise unread(field, given[field], (f"the settings of {of}",))
    return known | given


def require(found: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ConfigError for the first setting that has none of the values built here."""
    for field, values in wanted.items():
        value = found[field]
        if (list(value) if isinstance(value, tuple) else value) not in values:
            raise unread(field, value, values)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """The state dict under other names: of modules, or of single tensors. Nothing is copied.

    Raises ArtifactError for a weight that has none.
    """
    out: State = {}
    for key, value in state.items():
        module, _, kind = key.rpartition(".")
        if key in names:
            out[names[key]] = value
        elif module in names and kind in ("weight", "bias"):
            out[f"{names[module]}.{kind}"] = value
        else:
            raise ArtifactError(
                "A weight has no place in the architecture.", where=key, mend="Give the configuration it was made with."
            )
    return out


def unread(field: str, value: Any, known: tuple[Any, ...]) -> ConfigError:
    """A setting of the other library's that latentray does not build."""
    return ConfigError(
        f"{field} is {value!r}: latentray does not build that network.",
        where=field,
        mend=f"It builds those with {' or '.join(map(str, known))}.",
    )


def inexpressible(field: str, what: str, mend: str) -> ConfigError:
    """A setting of ours that diffusers has no words for."""
    return ConfigError(f"diffusers has no settings for {what}.", where=field, mend=mend)
