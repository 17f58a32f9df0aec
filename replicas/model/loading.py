"""Builds one shard of a model: transformers' code on the meta device, then only this rank's weights.

Nothing is guessed: what cannot be served is refused with the reason, before or right after loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from quire.replicas.errors import ModelNotServable
from quire.replicas.model.attention import ATTENTION, LayerHeads, probe_attention
from quire.replicas.model.checkpoint import WeightSource
from quire.replicas.model.invariance import EXPERTS, make_invariant
from quire.replicas.model.merged import merge_products
from quire.replicas.model.tensor_parallel import (
    Joins,
    ShardPlan,
    join_shards,
    output_head,
    shard_config,
    shrink_head,
)

Progress = Callable[[int, int], None]
"""Told (tensors done, tensors in all) while weights load."""

_OTHER_NAMES = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))
"""What transformers calls a module, and what checkpoints call it: Mixtral's and GPT-NeoX's."""

_SERVABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
_EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""A stacked parameter of all experts and the checkpoint's names of its parts: Qwen's and Mixtral's."""


@dataclass(frozen=True)
class LoadedModel:
    """A shard's model, ready to compute."""

    model: PreTrainedModel
    layers: tuple[LayerHeads, ...]


def load_model(
    checkpoint: WeightSource,
    config: PreTrainedConfig,
    *,
    rank: int,
    tp: int,
    group: Joins | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> LoadedModel:
    """One of `tp` shards. `group` joins them; None for one shard alone.

    Raises: ModelNotServable, ConfigError.
    """
    shard = shard_config(config, tp)
    shard._attn_implementation = ATTENTION
    if device.type == "cpu":
        shard._experts_implementation = EXPERTS
    model = meta_model(shard)
    shrink_head(model, tp)
    plan = ShardPlan.of(model, config, rank, tp)
    _load_weights(model, checkpoint, plan, dtype, device, progress or (lambda done, total: None))
    _fill_buffers(model, device)
    model.train(False)
    if device.type == "cuda":
        merge_products(model)
        torch.cuda.empty_cache()  # what they were merged from is the pool's
    layers = probe_attention(model)
    if tp > 1 and layers[0].query_heads != shard.num_attention_heads:
        raise ModelNotServable(
            f"{type(model).__name__} computes with {layers[0].query_heads} query heads on each of {tp} "
            f"shards instead of {shard.num_attention_heads}; set tp to 1"
        )
    if group is not None:
        join_shards(model, plan, group)
    if device.type == "cpu":
        make_invariant(model)
    return LoadedModel(model, layers)


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
    elif not isinstance(getattr(config, "num_hidden_layers", None), int):
        reason = "its config has no num_hidden_layers"
    else:
        reason = _rope_problem(config, max_model_tokens)
    if reason:
        raise ModelNotServable(f"{name} models are not servable here: {reason}")


def _rope_problem(config: PreTrainedConfig, max_model_tokens: int) -> str:
    """Position encodings that change with the longest sequence of a step would contradict cached keys."""
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        if entry.get("rope_type") == "dynamic":
            return 'RoPE of type "dynamic" changes with the length of the sequence, so keys cannot be cached'
        short = entry.get("original_max_position_embeddings")
        if entry.get("rope_type") == "longrope" and short and max_model_tokens > short:
            return (
                f'RoPE of type "longrope" changes beyond {short} tokens, so keys cannot be cached; '
                f"set max_model_tokens to {short} or less"
            )
    return ""


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without numbers. Raises ModelNotServable where transformers cannot build it."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config)
    except (KeyError, NotImplementedError, ValueError) as error:
        raise ModelNotServable(
            f"transformers cannot build {model_class.__name__} with our attention: {error}"
        ) from error
    return model


def _load_weights(
    model: PreTrainedModel,
    checkpoint: WeightSource,
    plan: ShardPlan,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress,
) -> None:
    head_name, head = output_head(model)
    tied = f"{head_name}.weight" if model.config.tie_word_embeddings else None
    wanted = {name: t for name, t in model.state_dict(keep_vars=True).items() if name != tied}
    for done, (name, meta) in enumerate(wanted.items()):
        progress(done, len(wanted))
        value = _read(checkpoint, name, tuple(meta.shape), plan)
        if plan.rank and plan.added_once(name):
            value = torch.zeros_like(value)
        value = value.to(device, dtype if value.is_floating_point() else None)
        _assign(model, name, nn.Parameter(value, False) if isinstance(meta, nn.Parameter) else value)
    if tied:
        table_VD = model.get_input_embeddings().weight
        assert isinstance(table_VD, Tensor)
        start = head.out_features * plan.rank if head.out_features < table_VD.shape[0] else 0
        head.weight = nn.Parameter(table_VD[start : start + head.out_features], False)
    progress(len(wanted), len(wanted))


def _read(checkpoint: WeightSource, name: str, local: tuple[int, ...], plan: ShardPlan) -> Tensor:
    """This rank's part of one parameter, put together from where the checkpoint keeps it."""
    for known in (name, *(name.replace(ours, theirs) for ours, theirs in _OTHER_NAMES if ours in name)):
        if known in checkpoint:
            return _read_tensor(checkpoint, known, name, local, plan)
        if experts := list(_expert_parts(checkpoint, known)):
            one = (local[1] // len(experts[0]), *local[2:])
            joined = [
                torch.cat([_read_tensor(checkpoint, part, name, one, plan, fused=False) for part in expert])
                for expert in experts
            ]
            return torch.stack(joined)
    raise ModelNotServable(
        f"the checkpoint in {checkpoint.folder} has no tensor {name}; its weights do not belong to its "
        "config.json, or it names them in a way this version does not know"
    )


def _read_tensor(
    checkpoint: WeightSource,
    tensor: str,
    parameter: str,
    local: tuple[int, ...],
    plan: ShardPlan,
    *,
    fused: bool = True,
) -> Tensor:
    whole = checkpoint.shape(tensor)
    if not local:
        return checkpoint.read(tensor)
    dim, ranges = plan.ranges(parameter, whole, local, fused=fused)
    parts = [checkpoint.read(tensor, (slice(None),) * dim + (one,)) for one in ranges]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _expert_parts(checkpoint: WeightSource, name: str) -> Iterator[list[str]]:
    """For a parameter stacked over experts: the names of each expert's own tensors."""
    prefix, _, leaf = name.rpartition(".")
    for parts in _EXPERT_PARTS.get(leaf, ()):
        expert = 0
        while (names := [f"{prefix}.{expert}.{part}.weight" for part in parts])[0] in checkpoint:
            yield names
            expert += 1


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers no checkpoint holds (RoPE's frequencies) as transformers' own loading does."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    # initialize_weights fills everything that does not carry this mark.
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()  # type: ignore[no-untyped-call]
