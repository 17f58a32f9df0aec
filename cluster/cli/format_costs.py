"""What each KV format costs a model, from its configuration alone: no weights, no cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from quire.kernels.formats import FORMATS, FormatError, layer_formats
from quire.kernels.layout import PageLayout
from quire.replicas.config import EngineConfig
from quire.replicas.model.policy import open_policy
from quire.replicas.runner.shard import servable_model

Policy = str | Mapping[str, object]


@dataclass(frozen=True, slots=True)
class FormatCost:
    """KV of one token over all layers and heads, scales and padding counted."""

    name: str
    bytes_per_token: float
    share_of_bf16: float


def policy_cost(model: str, policy: Policy, *, name: str, page_tokens: int = 64) -> FormatCost:
    """Raises UnknownModel, ModelNotServable, ConfigError; FormatError for a policy that does not fit."""
    _, config = servable_model(EngineConfig(model=model, kv=policy))
    return _cost(config, policy, name, page_tokens)


def format_costs(model: str, page_tokens: int = 64) -> tuple[list[FormatCost], dict[str, str]]:
    """The cost of every named format that fits the model, and why the others do not.

    Raises UnknownModel, ModelNotServable, ConfigError; FormatError if no format fits.
    """
    _, config = servable_model(EngineConfig(model=model))
    _cost(config, "bf16", "bf16", page_tokens)
    costs, misfits = [], {}
    for name in FORMATS:
        try:
            costs.append(_cost(config, name, name, page_tokens))
        except FormatError as error:
            misfits[name] = str(error)
    return costs, misfits


def _cost(config: PreTrainedConfig, policy: Policy, name: str, page_tokens: int) -> FormatCost:
    text = config.get_text_config()
    heads: int = text.num_attention_heads
    layout = PageLayout(
        open_policy(policy, text.num_hidden_layers).formats,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        page_tokens=page_tokens,
    )
    bf16 = replace(layout, layers=layer_formats("bf16", len(layout.layers)))
    return FormatCost(name, layout.bytes_per_token, layout.bytes_per_token / bf16.bytes_per_token)
