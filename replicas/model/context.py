"""How long a sequence a model takes, by its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from quire.replicas.errors import ModelNotServable


@dataclass(frozen=True, slots=True)
class ContextLength:
    """In tokens; None for a model without positions of its own."""

    usual: int | None
    """What is served unless something else is asked for."""
    most: int | None


_MAX_FACTOR = 1e6


def context_length(config: PreTrainedConfig) -> ContextLength:
    """The length a model was made for, and the one that its RoPE scaling reaches.

    YaRN's factor counts from the length before it, which configs often still give as
    `max_position_embeddings`. Linear scaling is described both ways in published configs: with its own length
    before scaling it counts likewise; without, it is the user who knows, and may ask for more.
    Raises ModelNotServable for lengths that are no numbers.
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
    """Why keys cannot be cached: position encodings that change with the longest sequence of a step."""
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
    """The RoPE parameters of every kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    yield from [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, Mapping)]
