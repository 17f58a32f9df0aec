"""Converts callers' values to plain Python ones: whole numbers, numbers, flags, texts.

Each refusal is an InvalidRequest that names the parameter and says what to give instead. Pure.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from quire.replicas.errors import InvalidRequest

MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1


def shown(value: Any) -> str:
    """Show any value briefly."""
    try:
        return reprlib.repr(value)
    except Exception:  # a custom repr, or a number of more digits than Python writes
        return f"a {type(value).__name__} that cannot be shown"


def whole(name: str, value: Any, least: int, most: int) -> int:
    """Convert an int, a NumPy integer or the like; True and 5.0 are refused."""
    number = _index(value)
    if number is None:
        raise InvalidRequest(f"{name} must be a whole number, got {shown(value)}")
    if not least <= number <= most:
        raise InvalidRequest(f"{name} must be in {least}..{most}, got {shown(number)}")
    return number


def finite(name: str, value: Any) -> float:
    """Convert a float, an int or a NumPy number; a bool, a text, NaN and infinity are refused."""
    if isinstance(value, float):
        number = float(value)  # of a subclass, too
    elif _is_bool(value) or isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise InvalidRequest(f"{name} must be a number, got {shown(value)}")
    else:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"{name} must be a number, got {shown(value)}") from error
    if not math.isfinite(number):
        raise InvalidRequest(f"{name} must be a finite number, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    """Convert True or False, also NumPy's."""
    if not _is_bool(value):
        raise InvalidRequest(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def text(name: str, value: Any, most: int | None = None) -> str:
    """Check a str that can be sent as UTF-8, of at most `most` characters."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a text (str), got {shown(value)}")
    if most is not None and len(value) > most:
        raise InvalidRequest(f"{name} has {len(value)} characters; at most {most} are allowed")
    if (at := _lone_surrogate(value)) is not None:
        raise InvalidRequest(
            f"{name} holds {value[at]!a} at character {at}, half of a surrogate pair, which UTF-8 cannot "
            "encode; decode its source with errors='replace'"
        )
    return str(value)


def texts(name: str, value: Any, most: int) -> tuple[str, ...]:
    """Convert a sequence of texts; a single text counts as a sequence of one."""
    values = (value,) if isinstance(value, str) else items(name, value, "texts")
    return tuple(text(f"{name}[{i}]", one, most) for i, one in enumerate(values))


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Convert a sequence of whole numbers from 0 on; the vocabulary is checked elsewhere."""
    ids = []
    for i, one in enumerate(items(name, value, "token ids")):
        number = _index(one)
        if number is None or not 0 <= number <= MAX_UINT32:
            raise InvalidRequest(
                f"{name}[{i}] must be a token id, a whole number from 0 on, got {shown(one)}"
            )
        ids.append(number)
    return tuple(ids)


def items(name: str, value: Any, of: str) -> list[Any]:
    """Return the elements of a list, a tuple or an array; a text, bytes, a mapping and a set are refused."""
    ordered = isinstance(value, Iterable) and isinstance(value, Sized) and hasattr(value, "__getitem__")
    if not ordered or isinstance(value, str | bytes | bytearray | memoryview | Mapping):
        raise InvalidRequest(f"{name} must be a sequence of {of}, got {shown(value)}")
    try:
        return list(value)
    except TypeError as error:  # an array without dimensions
        raise InvalidRequest(f"{name} must be a sequence of {of}, got {shown(value)}") from error


def is_whole(value: Any) -> bool:
    """Tell whether `whole` would accept it, whatever its size."""
    return _index(value) is not None


def _index(value: Any) -> int | None:
    if type(value) is int:  # the usual case, and a prompt has many
        return value
    if _is_bool(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _is_bool(value: Any) -> bool:
    """Tell whether it is a bool, also NumPy's or torch's."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _lone_surrogate(value: str) -> int | None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
