"""A job's settings as YAML with what each means above it: the text of `--help`, from the schema's own docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

import yaml


def settings(values: Mapping[str, Any], schema: type) -> str:
    """YAML of `values`, each key under a comment with its docstring's text; groups are indented, and stand last."""
    return "\n".join(_lines(values, schema))


def _lines(values: Mapping[str, Any], schema: type | None) -> list[str]:
    meanings = docstrings(schema) if schema is not None else {}
    kinds = typing.get_type_hints(schema) if schema is not None else {}
    lines: list[str] = []
    for key, value in sorted(values.items(), key=lambda item: _is_group(item[1])):
        if key in meanings:
            lines.append(f"# {meanings[key]}")
        if _is_group(value):
            lines.append(f"{key}:")
            lines += textwrap.indent("\n".join(_lines(value, _dataclass_of(kinds.get(key)))), "  ").splitlines()
        else:
            lines += yaml.safe_dump({key: value}, default_flow_style=False, sort_keys=False, width=10**6).splitlines()
    return lines


def _is_group(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _dataclass_of(kind: Any) -> type | None:
    """The dataclass in an annotation such as `X` or `X | None`."""
    for one in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(one) and isinstance(one, type):
            return one
    return None


def docstrings(schema: type) -> dict[str, str]:
    """Field -> the string that stands below it in the class, on one line."""
    found: dict[str, str] = {}
    for one in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(node, ast.ClassDef)
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = " ".join(below.value.value.split())
    return found
