"""Converts plain values from YAML, JSON and callers to a checked configuration.

msgspec converts by the types of the dataclasses, bounds included; what it refuses is told in our words.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict
from reprlib import repr as shown
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

from quire.replicas.errors import ConfigError

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]

T = TypeVar("T")

_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def decode(kind: type[T], tree: object) -> T:
    """Decode a configuration from a mapping of keys to values.

    Raises ConfigError, which names the key by its place in the tree, and says what it takes and what was
    given.
    """
    shape = inspect.type_info(kind)
    _refuse_unknown_keys(shape, tree, "")
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(_explained(str(error), shape, tree)) from error


def checked(config: T) -> T:
    """Check a configuration that was made in Python, as `decode` does."""
    return decode(type(config), asdict(config))  # type: ignore[call-overload]


def _refuse_unknown_keys(shape: inspect.Type, tree: object, path: str) -> None:
    """`path`: where in the tree this is, with a dot at the end."""
    keys = _keys(shape)
    if not keys or not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if key not in keys:
            where = path.rstrip(".") or "the configuration"
            near = difflib.get_close_matches(str(key), keys, 1)
            hint = f". Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown key {path}{key}; {where} has the keys {', '.join(keys)}{hint}")
        _refuse_unknown_keys(keys[key], value, f"{path}{key}.")


def _explained(error: str, shape: inspect.Type, given: Any) -> str:
    """Reword msgspec's message, such as "Expected `int`, got `str` - at `$.engine.tp`", in our words."""
    place = re.search(r"`\$\.([\w.]+)", error)
    path = place[1] if place else ""
    for key in filter(None, path.split(".")):
        shape, given = _keys(shape)[key], given[key]
    where = path or "the configuration"
    if missing := re.search(r"missing required field `(\w+)`", error):
        return f"{where} lacks a key without a default: {missing[1]}"
    return f"{where} must be {_words(shape)}, got {shown(given)}"


def _keys(shape: inspect.Type) -> dict[str, inspect.Type]:
    """Return the keys of a dataclass, also of one that may be null; none of other types."""
    options = shape.types if isinstance(shape, inspect.UnionType) else (shape,)
    return {f.name: f.type for one in options if isinstance(one, inspect.DataclassType) for f in one.fields}


def _words(shape: inspect.Type) -> str:
    """Describe the values of a key."""
    match shape:
        case inspect.UnionType():
            return " or ".join(map(_words, shape.types))
        case inspect.LiteralType():
            return f"one of {', '.join(map(repr, shape.values))}"
        case inspect.IntType() | inspect.FloatType():
            given = {words: getattr(shape, name) for name, words in _BOUNDS.items()}
            bounds = " and ".join(f"{words} {bound}" for words, bound in given.items() if bound is not None)
            number = "a whole number" if isinstance(shape, inspect.IntType) else "a number"
            return f"{number} ({bounds})" if bounds else number
        case inspect.DictType(value_type=inspect.FloatType()):
            return f"a mapping in which each value is {_words(shape.value_type)}"
        case inspect.DataclassType():
            return f"a mapping of keys to values ({shape.cls.__name__})"
    names = {inspect.StrType: "a text", inspect.BoolType: "true or false", inspect.NoneType: "null"}
    return names.get(type(shape), "a mapping")
