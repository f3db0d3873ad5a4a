"""Which samples are taken: bounds of sizes, captions and scores, and a condition that is read, never run.

A condition is parsed with `ast` and interpreted node by node; what is not in the tables below is refused when it is read, so
that no text of a user's or of a data set's becomes code.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from latentray.config.build_shards import FilterConfig
from latentray.errors import ConfigError

About = Mapping[str, Any]
"""What is known of a sample: its columns or the keys of its `.json`, and BUILT_IN."""

BUILT_IN = ("name", "caption", "width", "height")
"""Known of every sample, whatever its source: `width` and `height` are the picture's own, in pixels, upright."""

_LONGEST = 2000
_OF_SIZE = frozenset({"width", "height"})

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,  # codespell:ignore notin
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.Not: operator.not_,
    ast.USub: lambda a: -_number(a),
    ast.UAdd: lambda a: +_number(a),
}
_CALLS: dict[str, Callable[[Any], Any]] = {"len": len, "lower": lambda text: str.lower(text)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """A parsed `filter.where`."""

    body: ast.expr
    names: frozenset[str]
    """What it asks of a sample."""

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises ConfigError for what is no expression, or uses anything but the tables above."""
        if len(text) > _LONGEST:
            raise _refused(f"It has {len(text)} characters.", f"Keep it below {_LONGEST}.")
        try:
            body = ast.parse(text.strip(), mode="eval").body
            names = frozenset(_checked(body))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, ConfigError):
                raise
            raise _refused(f"{text!r} is no expression: {error}", 'Write it like "width > 512".') from None
        return cls(body=body, names=names)

    def holds(self, about: About) -> bool:
        """Raises TypeError, ArithmeticError or the like where it cannot be decided: a value that is missing, say."""
        return bool(_value(self.body, about))


def _checked(node: ast.expr) -> set[str]:
    """The names in an expression. Raises ConfigError for a node that is not allowed."""
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return set()
        case ast.Name(id=name):
            return {name}
        case ast.BoolOp(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return set().union(*map(_checked, parts))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _checked(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _checked(left) | _checked(right)
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
            return set().union(*map(_checked, [left, *others]))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _CALLS:
            return _checked(argument)
    raise _refused(
        f"{ast.unparse(node)!r} is not allowed in a condition.",
        "Use comparisons, and, or, not, in, + - * / // %, names, numbers, quoted text, len(x) and lower(x).",
    )


def _value(node: ast.expr, about: About) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return about.get(name)
        case ast.BoolOp(op=op, values=parts):
            joined = all if isinstance(op, ast.And) else any
            return joined(_value(part, about) for part in parts)
        case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
            return [_value(part, about) for part in parts]
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand, about))
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_number(_value(left, about)), _number(_value(right, about)))
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_value(one, about) for one in (left, *others)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, values, values[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return _CALLS[name](_value(argument, about))
    raise AssertionError(f"unchecked node {node!r}")


def _number(value: Any) -> float:
    if not isinstance(value, int | float):  # text times a number would fill the memory
        raise TypeError(f"{value!r} is no number")
    return value


def _refused(what: str, mend: str) -> ConfigError:
    return ConfigError(what, where="filter.where", mend=mend)


class Filter:
    """The filters of a configuration. Raises ConfigError for a condition that cannot be read."""

    def __init__(self, config: FilterConfig):
        self.config, self.scores = config, config.scores or {}
        self.condition = Condition.parse(config.where) if config.where is not None else None
        in_condition = self.condition.names if self.condition else frozenset()
        self.names = (set(self.scores) | in_condition) - set(BUILT_IN)
        """Columns or keys it asks for beside BUILT_IN."""
        self.needs_picture = config.by_size or not _OF_SIZE.isdisjoint(in_condition | set(self.scores))
        """Whether it asks for the picture's size: `reason` then wants `width` and `height`."""
        self.needs_caption = config.caption_length is not None or "caption" in in_condition
        self._condition_waits = not _OF_SIZE.isdisjoint(in_condition)
        self._in_condition = in_condition

    def require_known(self, known: Collection[str], *, where: str) -> None:
        """Raise ConfigError for a name that is neither a column (or key) of the input nor built in."""
        for asked, setting in ((set(self.scores), "filter.scores"), (self._in_condition, "filter.where")):
            for name in sorted(asked - set(known) - set(BUILT_IN)):
                raise ConfigError(
                    f"The samples of {where} have no {name!r}.",
                    where=f"{setting}.{name}" if setting == "filter.scores" else setting,
                    mend=f"There are: {', '.join(sorted({*known, *BUILT_IN}))}.",
                )

    def reason(self, about: About) -> str | None:
        """What a sample is filtered by, or None for one that is taken."""
        return self.reason_of_metadata(about) or self.reason_of_picture(about)

    def reason_of_metadata(self, about: About) -> str | None:
        """As `reason`, by what is known before the picture is read."""
        config = self.config
        if config.caption_length is not None and not _within(len(about["caption"]), config.caption_length):
            return "caption_length"
        for name, bounds in self.scores.items():
            if name not in _OF_SIZE and (why := _score_reason(name, about.get(name), bounds)):
                return why
        return None if self._condition_waits else self._condition_reason(about)

    def reason_of_picture(self, about: About) -> str | None:
        """As `reason`, by `width` and `height`."""
        if not self.needs_picture:
            return None
        config, width, height = self.config, about["width"], about["height"]
        checks = {
            "min_side": config.min_side is None or min(width, height) >= config.min_side,
            "max_side": config.max_side is None or max(width, height) <= config.max_side,
            "min_pixels": config.min_pixels is None or width * height >= config.min_pixels,
            "aspect": config.aspect is None or _within(width / height, config.aspect),
        }
        for name, passed in checks.items():
            if not passed:
                return name
        for name in sorted(_OF_SIZE & set(self.scores)):
            if why := _score_reason(name, about[name], self.scores[name]):
                return why
        return self._condition_reason(about) if self._condition_waits else None

    def _condition_reason(self, about: About) -> str | None:
        if self.condition is None:
            return None
        try:
            return None if self.condition.holds(about) else "where"
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            return "where_undecided"


def _score_reason(name: str, value: Any, bounds: list[float | None]) -> str | None:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if math.isnan(score):
        return f"scores.{name}_missing"
    return None if _within(score, bounds) else f"scores.{name}"


def _within(value: float, bounds: list[Any]) -> bool:
    least, greatest = bounds
    return (least is None or value >= least) and (greatest is None or value <= greatest)
