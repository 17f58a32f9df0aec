"""Builds one shard of a model: transformers' code on the meta device, then only this rank's weights.

What cannot be served is refused with the reason, before or right after loading.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from quire.replicas.errors import ModelNotServable
from quire.replicas.model.attention import ATTENTION, LayerHeads, probe_attention
from quire.replicas.model.checkpoint import WeightSource
from quire.replicas.model.context import rope_problem
from quire.replicas.model.invariance import EXPERTS, make_invariant
from quire.replicas.model.key_bias import AttentionCall, attention_calls
from quire.replicas.model.merged import merge_products
from quire.replicas.model.meta import meta_model
from quire.replicas.model.tensor_parallel import (
    Collectives,
    ShardPlan,
    add_collectives,
    shard_config,
    shrink_head,
)

_LOG = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (tensors done, all tensors) while weights load."""

_SERVABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class LoadedModel:
    """A shard's model, ready to compute."""

    model: PreTrainedModel
    layers: tuple[LayerHeads, ...]
    calls: tuple[AttentionCall, ...]
    """Every layer's attention call; none for a model without any bias."""


def load_model(
    weights: WeightSource,
    config: PreTrainedConfig,
    *,
    rank: int,
    tp: int,
    group: Collectives | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load one of `tp` shards. `group` connects them; None for a single shard.

    Raises: ModelNotServable, ConfigError.
    """
    shard = shard_config(config, tp)
    shard._attn_implementation = ATTENTION
    if device.type == "cpu":
        shard._experts_implementation = EXPERTS
    model = meta_model(shard)
    shrink_head(model, tp)
    plan = ShardPlan.of(model, config, rank, tp)
    _load_weights(model, weights, plan, dtype, device, progress or (lambda done, total: None))
    _fill_buffers(model, device)
    model.train(False)
    layers, calls = probe_attention(model), attention_calls(model)
    if tp > 1 and layers[0].query_heads != shard.num_attention_heads:
        raise ModelNotServable(
            f"{type(model).__name__} computes with {layers[0].query_heads} query heads on each of {tp} "
            f"shards instead of {shard.num_attention_heads}; set tp to 1"
        )
    if device.type == "cuda":
        merge_products(model)
        torch.cuda.empty_cache()  # the unmerged weights' memory is for the pool
    if group is not None:
        add_collectives(model, plan, group)
    if device.type == "cpu":
        make_invariant(model)
    return LoadedModel(model, layers, calls)


def check_servable(config: PreTrainedConfig, max_model_tokens: int) -> None:
    """Refuse what the configuration alone shows we cannot serve. Raises ModelNotServable."""
    name = config.model_type
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder; only decoders are servable"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = "transformers has no causal language model of this type"
    elif getattr(config, "text_config", None) is not None:
        reason = "it takes more than text; convert its text model to a checkpoint of its own"
    elif getattr(config, "quantization_config", None) is not None:
        reason = "its weights are quantized; use the bf16 or fp16 checkpoint (only KV is quantized here)"
    elif getattr(config, "kv_lora_rank", None) is not None:
        reason = "its multi-head latent attention caches no K and V heads (kv_lora_rank)"
    elif not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False):
        reason = "its attention is not causal"
    elif others := set(getattr(config, "layer_types", None) or ()) - _SERVABLE_LAYERS:
        kinds = " and ".join(sorted(_SERVABLE_LAYERS))
        reason = f"it has {', '.join(sorted(others))} layers; only {kinds} are servable"
    elif getattr(config, "is_heterogeneous", False):
        reason = "its layers differ in their heads or sizes; pages need all layers to be the same"
    elif not isinstance(layers := getattr(config, "num_hidden_layers", None), int) or layers < 1:
        reason = f"its config says num_hidden_layers {layers!r}"
    else:
        reason = rope_problem(config, max_model_tokens)
    if reason:
        raise ModelNotServable(f"{name} models are not servable here: {reason}")


def _load_weights(
    model: PreTrainedModel,
    weights: WeightSource,
    plan: ShardPlan,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> None:
    state = model.state_dict(keep_vars=True)
    wanted = {name: t for name, t in state.items() if name in weights}
    for done, (name, meta) in enumerate(wanted.items()):
        progress(done, len(wanted))
        value = _read(weights, name, tuple(meta.shape), plan)
        if plan.rank and plan.bias_on_rank0_only(name):
            value = torch.zeros_like(value)
        value = value.to(device, dtype if value.is_floating_point() else None)
        _assign(model, name, nn.Parameter(value, False) if isinstance(meta, nn.Parameter) else value)
    for target, source in model.all_tied_weights_keys.items():
        _tie(model, weights, plan, target, source)
    progress(len(wanted), len(wanted))


def _read(weights: WeightSource, name: str, local: tuple[int, ...], plan: ShardPlan) -> Tensor:
    """Read this rank's part of one parameter."""
    if not local:
        return weights.read(name)
    dim, ranges = plan.ranges(name, weights.shape(name), local)
    parts = [weights.read(name, (slice(None),) * dim + (one,)) for one in ranges]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _tie(model: PreTrainedModel, weights: WeightSource, plan: ShardPlan, target: str, source: str) -> None:
    """Tie `target` to `source` (an output head to the embeddings, say) by transformers' rules.

    If the checkpoint lacks one, it is the other. Two that differ are not tied, whatever the config says.
    """
    if source not in weights:
        whole = weights.read(target).to(model.get_parameter(target))
        _assign(model, source, nn.Parameter(whole, False))
    whole, own = model.get_parameter(source).data, model.get_parameter(target)
    dim, (rows,) = plan.ranges(target, whole.shape, own.shape)
    part = whole.narrow(dim, rows.start, rows.stop - rows.start)
    if target not in weights or torch.equal(own, part):
        _assign(model, target, nn.Parameter(part, False))
    elif plan.rank == 0:
        _LOG.warning(
            "%s says tie_word_embeddings, but the checkpoint holds a %s of its own: it is used, as by "
            "transformers; set tie_word_embeddings to false",
            weights.folder / "config.json",
            target,
        )


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that checkpoints lack (RoPE's frequencies), as transformers' loading does."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    # initialize_weights fills everything that does not carry this mark.
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()  # type: ignore[no-untyped-call]
