"""Hydra at the edge: command line -> composed YAML -> a typed, checked dataclass.

Nothing below a job sees a DictConfig. Everything wrong with a command line is one ConfigError that names the key, the
nearest key there is, and what the key takes.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from latentray.errors import ConfigError

Schema = TypeVar("Schema")
_QUOTING = (
    """Quote a value that holds , = : or brackets twice, for the shell and for Hydra: "prompt='a red, blue circle'"."""
)


def conf_dir() -> Path:
    """The configuration folder: `$LATENTRAY_CONF`, else the installed wheel's copy, else the checkout's `conf/`."""
    package = Path(__file__).resolve().parents[1]
    named = os.environ.get("LATENTRAY_CONF")
    candidates = [*([Path(named)] if named else []), package / "conf", package.parents[1] / "conf"]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.absolute()
    raise ConfigError(
        "The configuration folder was not found.", where=str(candidates[0]), mend="Set LATENTRAY_CONF to it."
    )


def load(name: str, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """Compose `conf/<name>.yaml` with Hydra overrides (`key=value`) and return it as a checked `schema`.

    Raises ConfigError for an unknown key (naming the nearest), a wrong type, a missing value, or whatever the schema's
    own checks refuse.
    """
    return typed(compose(name, overrides), schema)


def compose(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The composed, resolved but still untyped configuration of a job."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            plain = hydra_compose(name, overrides=_choices(overrides))
            _refuse_unknown(overrides, plain)
            cfg = hydra_compose(name, overrides=[_freed(one, plain) for one in overrides])
            OmegaConf.resolve(cfg)
            return cfg
    except HydraException as error:
        unread = isinstance(error, OverrideParseException) or str(error).startswith("Ambiguous value")
        mend = _QUOTING if unread else _mend(name)
        raise ConfigError(_first_line(error), where=f"conf/{name}.yaml", mend=mend) from None
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error), where=getattr(error, "full_key", "") or "", mend=_mend(name)) from None


def typed(cfg: DictConfig, schema: type[Schema]) -> Schema:
    """A composed configuration as an instance of its schema, whose `__post_init__` checks have run."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), cfg)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or getattr(error, "key", "") or ""
        what = _first_line(error)
        if "not in" in what and key:
            known = _leaves(OmegaConf.structured(schema))
            raise _unknown(str(key), known) from None
        if "is not a subclass of" in what and key:
            inner = [leaf for leaf in _leaves(OmegaConf.structured(schema)) if leaf.startswith(f"{key}.")]
            raise ConfigError(
                "It is a group of settings, not a value.",
                where=str(key),
                mend=f"Set one of its keys: {', '.join(inner)}.",
            ) from None
        raise ConfigError(what, where=str(key), mend=_wanted(schema, str(key))) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A typed configuration as plain JSON values: what manifests and W&B record."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # type: ignore[return-value]


def from_dict(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """The inverse of `to_dict`, checked like a command line."""
    return typed(OmegaConf.create(values), schema)


def to_yaml(cfg: DictConfig) -> str:
    return OmegaConf.to_yaml(cfg)


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain YAML values."""
    return OmegaConf.to_container(cfg)  # type: ignore[return-value]


def groups_of(name: str) -> dict[str, list[str]]:
    """The groups that a job takes: those of its defaults list, and of the configurations that the list names."""
    taken = _groups_taken(name)
    return {group: names for group, names in groups().items() if group in taken}


def _groups_taken(name: str) -> set[str]:
    listed = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text()).get("defaults", [])
    taken: set[str] = set()
    for entry in listed:
        if isinstance(entry, dict):
            taken |= {str(key).split()[-1].strip("/").split("@")[0] for key in entry}
        elif entry != "_self_":
            taken |= _groups_taken(str(entry).strip("/").split("@")[0])
    return taken


def groups() -> dict[str, list[str]]:
    """The configuration groups and the names each takes."""
    root = conf_dir()
    folders = sorted(p for p in root.rglob("*") if p.is_dir() and any(p.glob("*.yaml")))
    return {f.relative_to(root).as_posix(): sorted(y.stem for y in f.glob("*.yaml")) for f in folders}


def _refuse_unknown(overrides: Sequence[str], plain: DictConfig) -> None:
    """Hydra's own message for a misspelt key names no neighbour; this one does."""
    known = _leaves(plain)
    taken = groups()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if override.is_add() or override.is_delete() or key.startswith("hydra"):
            continue
        if key in taken:
            value = override.value()
            names = [value] if isinstance(value, str) else []
            for name in names:
                if name not in taken[key]:
                    near = difflib.get_close_matches(name, taken[key], n=1)
                    hint = f"Did you mean {key}={near[0]}? " if near else ""
                    raise ConfigError(
                        f"There is no {key!r} called {name!r}.",
                        where=key,
                        mend=f"{hint}Known: {', '.join(taken[key])}.",
                    )
        elif key not in known and not any(k.startswith(key + ".") for k in known) and not _is_free(plain, key):
            raise _unknown(key, known | set(taken))


def _choices(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose a member of a group: which keys there are depends on them."""
    taken = groups()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [o.input_line for o in parsed if o.input_line and o.value() in taken.get(o.key_or_group, ())]


def _freed(override: str, plain: DictConfig) -> str:
    """The override; where it is of an open mapping or below one, with Hydra's word for keys that are new."""
    parsed = OverridesParser.create().parse_override(override)
    told = parsed.is_add() or parsed.is_force_add() or parsed.is_delete()
    return f"++{override}" if not told and _is_free(plain, parsed.key_or_group) else override


def _is_free(plain: DictConfig, key: str) -> bool:
    """True for a mapping that is declared open, such as `deepspeed.extra`, and below it: an empty dict takes any key."""
    parts = key.split(".")
    nodes = (OmegaConf.select(plain, ".".join(parts[: i + 1]), default=None) for i in range(len(parts)))
    return any(isinstance(node, DictConfig) and len(node) == 0 for node in nodes)


def _unknown(key: str, known: set[str]) -> ConfigError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # a misspelt leaf in a long path: compare the last words
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [by_leaf[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_leaf, n=1)]
    mend = f"Did you mean {near[0]!r}?" if near else "See the keys with --help."
    return ConfigError(f"There is no setting {key!r}.", where=key, mend=mend)


def _leaves(cfg: Any, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key in cfg if isinstance(cfg, DictConfig) else ():
        name = f"{prefix}{key!s}"
        keys.add(name)
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            keys |= _leaves(node, f"{name}.")
    return keys


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return re.sub(r"\s*full_key:.*", "", line)


def _mend(name: str) -> str:
    return f"See the settings with: python -m jobs.{name} --help"


def _wanted(schema: type, key: str) -> str:
    """What a key takes, read from the schema: `global_batch_size takes int`."""
    kind: Any = schema
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return "Give a value of the right type."
        found = {f.name: f.type for f in dataclasses.fields(kind)}.get(part)
        if found is None:
            return "Give a value of the right type."
        kind = typing.get_type_hints(kind).get(part, found)
    return f"{key} takes {getattr(kind, '__name__', kind)}."
