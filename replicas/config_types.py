"""Whether the values of a configuration are of the types that its fields say."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from reprlib import repr as shown
from typing import Any, Literal

from quire.replicas.errors import ConfigError


def check_types(config: Any, path: str = "") -> None:
    """Of a frozen dataclass; `path` is its place in the tree, with a dot at the end. Raises ConfigError."""
    hints = typing.get_type_hints(type(config))
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if not fits(hints[name], value):
            raise ConfigError(f"{path}{name} must be {words(hints[name])}, got {shown(value)}")


def fits(hint: Any, value: object) -> bool:
    """Whether a field of this type may have this value."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(option, value) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def words(hint: Any) -> str:
    """What such a field takes, for messages."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        types.NoneType: "null",
    }
    return " or ".join(
        _name(option) if is_dataclass(option) else names.get(option, "a mapping") for option in options
    )


def _name(kind: Any) -> str:
    return f"a {kind.__name__}"
