"""The longest sequence a model takes, by its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from quire.replicas.errors import ModelNotServable


@dataclass(frozen=True, slots=True)
class ContextLength:
    """Context lengths in tokens; None for a model without position limits."""

    usual: int | None
    """The default of max_model_tokens."""
    most: int | None


_MAX_FACTOR = 1e6


def context_length(config: PreTrainedConfig) -> ContextLength:
    """Return the length a model was trained for, and the one that its RoPE scaling reaches.

    YaRN's factor counts from the length before it, which configs often still give as
    `max_position_embeddings`. Published configs give linear scaling with a length before it, which counts
    likewise, or without one, which leaves it to the user to set a larger length.
    Raises ModelNotServable for lengths that are not numbers.
    """
    given = getattr(config, "max_position_embeddings", None)
    if given is None:
        return ContextLength(None, None)
    if type(given) is not int or given < 1:
        raise ModelNotServable(f"config.json says max_position_embeddings {given!r}, which is no length")
    usual = most = given
    for rope in rope_entries(config):
        kind, factor = rope.get("rope_type"), rope.get("factor")
        if kind not in ("yarn", "linear") or not isinstance(factor, int | float):
            continue
        if not 1 <= factor < _MAX_FACTOR:  # NaN is refused as well
            raise ModelNotServable(f"config.json gives RoPE the factor {factor!r}, which is no scaling")
        before = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        reached = int((before or given) * factor)
        most = max(most, reached)
        if kind == "yarn" or before:
            usual = max(usual, reached)
    return ContextLength(usual, most)


def rope_problem(config: PreTrainedConfig, max_model_tokens: int) -> str:
    """Return why keys cannot be cached (RoPE that depends on a step's longest sequence), or an empty text."""
    for rope in rope_entries(config):
        if rope.get("rope_type") == "dynamic":
            return 'RoPE of type "dynamic" changes with the length of the sequence, so keys cannot be cached'
        short = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and short is not None and type(short) is not int:
            return f"its longrope counts from original_max_position_embeddings {short!r}, which is no length"
        if rope.get("rope_type") == "longrope" and short and max_model_tokens > short:
            return (
                f'RoPE of type "longrope" changes beyond {short} tokens, so keys cannot be cached; '
                f"set max_model_tokens to {short} or less"
            )
    return ""


def rope_entries(config: PreTrainedConfig) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE parameters of every kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    yield from [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, Mapping)]
