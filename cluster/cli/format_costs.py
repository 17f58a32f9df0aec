"""What each KV format costs a model, from its configuration alone: no weights, no cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from quire.kernels.formats import FORMATS, layer_formats
from quire.kernels.layout import PageLayout
from quire.replicas.model.checkpoint import find_model, load_config
from quire.replicas.model.policy import open_policy

Policy = str | Mapping[str, object]


@dataclass(frozen=True, slots=True)
class FormatCost:
    """KV of one token over all layers and heads, scales and padding counted."""

    name: str
    bytes_per_token: float
    share_of_bf16: float


def policy_cost(model: str, policy: Policy, *, name: str, page_tokens: int = 64) -> FormatCost:
    """Raises UnknownModel, ModelNotServable; ConfigError for a policy that does not fit the model."""
    return _cost(load_config(find_model(model)), policy, name, page_tokens)


def format_costs(model: str, page_tokens: int = 64) -> tuple[FormatCost, ...]:
    """Every named format that fits the model's head_dim."""
    config = load_config(find_model(model))
    head_dim = _layout(config, "bf16", page_tokens).head_dim
    names = [name for name in FORMATS if _fits(name, head_dim)]
    return tuple(_cost(config, name, name, page_tokens) for name in names)


def _fits(name: str, head_dim: int) -> bool:
    group = FORMATS[name].k.group
    return not group or group == head_dim or (head_dim // 2) % group == 0


def _cost(config: PreTrainedConfig, policy: Policy, name: str, page_tokens: int) -> FormatCost:
    layout = _layout(config, policy, page_tokens)
    bf16 = replace(layout, layers=layer_formats("bf16", len(layout.layers)))
    return FormatCost(name, layout.bytes_per_token, layout.bytes_per_token / bf16.bytes_per_token)


def _layout(config: PreTrainedConfig, policy: Policy, page_tokens: int) -> PageLayout:
    text = config.get_text_config()
    heads: int = text.num_attention_heads
    return PageLayout(
        open_policy(policy, text.num_hidden_layers).formats,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        page_tokens=page_tokens,
    )
