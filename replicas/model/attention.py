"""The attention function that transformers' models call, and a probe that learns each layer's attention.

A model calls it once a layer with queries, keys and values after RoPE; the step's metadata is passed as the
keyword argument `step` of `model(...)`. Names: T tokens, Q query heads, H kv heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from quire.kernels.cache_view import AttentionSpec
from quire.replicas.errors import ModelNotServable

ATTENTION = "quire"
"""The name under which transformers finds `paged_attention`. It has no mask function: no mask is built."""

_IGNORED = frozenset({"dropout", "position_ids"})
"""Arguments of other attention functions that do not change what causal attention means."""


class AttentionStep(Protocol):
    """What `paged_attention` needs of its `step`."""

    def attend(
        self, module: nn.Module, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Compute attention outputs [T, Q, D] of the layer of `module` (`layer_index`)."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    step: AttentionStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Have transformers' signature: query [1, Q, T, D], key and value [1, H, T, D] → [1, T, Q, D].

    Raises: ModelNotServable where the model asks for an attention we do not implement.
    """
    if step is None:
        raise ModelNotServable(
            f"{type(module).__name__} does not pass keyword arguments to its attention, so paged KV cannot "
            "reach it; this architecture is not servable"
        )
    unknown = [n for n, given in extra.items() if not (given is None or given is False or n in _IGNORED)]
    if unknown or attention_mask is not None:
        raise ModelNotServable(
            f"{type(module).__name__} uses {', '.join(unknown) or 'an attention mask of its own'}, which "
            "paged attention does not implement; this architecture is not servable"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelNotServable(f"the attention of {type(module).__name__} is not causal; it is not servable")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_TQD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
    spec = AttentionSpec(scale, sliding_window, softcap)
    return step.attend(module, q_TQD, k_THD, v_THD, spec)[None], None


def layer_index(module: nn.Module) -> int:
    """Return the number of the layer that an attention module belongs to."""
    index = module.layer_idx
    assert isinstance(index, int)
    return index


AttentionInterface.register(ATTENTION, paged_attention)


@dataclass(frozen=True, slots=True)
class LayerHeads:
    """The attention of one layer, as the model calls it."""

    query_heads: int
    kv_heads: int
    k_dim: int
    v_dim: int
    spec: AttentionSpec


class Probe:
    """A step that computes nothing and records its arguments."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerHeads] = {}

    def attend(
        self, module: nn.Module, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        layer = layer_index(module)
        if layer in self.layers:
            raise ModelNotServable(
                f"layer {layer} calls attention more than once a step; pages hold one K and V of a layer"
            )
        self.layers[layer] = LayerHeads(q_TQD.shape[1], k_THD.shape[1], k_THD.shape[2], v_THD.shape[2], spec)
        return q_TQD.new_zeros(*q_TQD.shape[:2], v_THD.shape[2])


@torch.inference_mode()
def probe_attention(model: PreTrainedModel) -> tuple[LayerHeads, ...]:
    """Learn every layer's attention from a forward pass of two tokens.

    Raises: ModelNotServable where a layer's attention never reaches `paged_attention`, or has heads or a
    window that pages cannot hold.
    """
    config, name = model.config, type(model).__name__
    probe = Probe()
    two = torch.arange(2, device=model.device)[None]
    try:
        logits = model(
            input_ids=two, position_ids=two, use_cache=False, step=probe, logits_to_keep=two[0, :1]
        ).logits
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelNotServable(
            f"{name} fails without a mask and a cache of its own ({type(error).__name__}: {error}); this "
            "architecture is not servable"
        ) from error
    if logits.shape[:2] != (1, 1):
        raise ModelNotServable(f"{name} does not implement logits_to_keep; this architecture is not servable")
    missing = sorted(set(range(config.num_hidden_layers)) - set(probe.layers))
    if missing:
        raise ModelNotServable(
            f"layers {missing} of {name} keep no K and V that reach paged attention (another kind of layer, "
            "or an attention of their own); this architecture is not servable"
        )
    layers = tuple(probe.layers[i] for i in range(config.num_hidden_layers))
    for index, heads in enumerate(layers):
        _check_layer(name, index, heads, layers[0], _expected_window(config, index))
    return layers


def _check_layer(name: str, index: int, heads: LayerHeads, first: LayerHeads, window: int | None) -> None:
    if heads.k_dim != heads.v_dim:
        raise ModelNotServable(
            f"layer {index} of {name} has K heads of {heads.k_dim} and V heads of {heads.v_dim} (multi-head "
            "latent attention or the like); pages need both to be the same"
        )
    if (heads.kv_heads, heads.k_dim) != (first.kv_heads, first.k_dim):
        raise ModelNotServable(
            f"layer {index} of {name} has {heads.kv_heads} kv heads of {heads.k_dim}, layer 0 has "
            f"{first.kv_heads} of {first.k_dim}; pages need all layers to be the same"
        )
    if heads.spec.window != window:
        raise ModelNotServable(
            f"layer {index} of {name} should have the sliding window {window} by its config but asks "
            f"attention for {heads.spec.window}; this architecture is not servable"
        )


def _expected_window(config: PreTrainedConfig, layer: int) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    return window if types is None or types[layer] == "sliding_attention" else None
