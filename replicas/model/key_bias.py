"""Finds the layers whose keys have a constant part too large for a low-bit format.

Models of the Qwen2 family add a bias to K that is many times what the weights produce, on some layers. One
scale per token then resolves the bias and rounds the rest away. Such layers need a static transform of K
(`calibration.py`), from a calibrated policy or, without one, from the fixed prompt at load.

The bias is measured, whatever modules are called: a layer's attention gets random inputs of the size that its
norm produces, all at position 0, where RoPE is the identity. The mean of the keys is their constant part.
Names: N inputs, H kv heads, D head_dim.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel

from quire.kernels.cache_view import AttentionSpec
from quire.kernels.formats import Codes, LayerFormat
from quire.replicas.model.attention import ATTENTION, layer_index
from quire.replicas.model.checkpoint import WeightSource
from quire.replicas.model.meta import meta_model

_LIMITS = {Codes.INT8: 8.0, Codes.FP8: 8.0, Codes.INT4: 2.0}
"""The largest bias, in norms of a typical key. Rounding noise is about 0.026 (int8) and 0.12 (int4, rotated)
of the stored norm at head_dim 128: the limits keep it near a fifth of the key."""

_INPUTS = 64
"""Number of random inputs; the norm of their mean is an eighth of theirs by chance."""


@dataclass(frozen=True)
class AttentionCall:
    """How the model calls a layer's attention for a token at position 0."""

    name: str
    """Name of the attention module."""
    attention: nn.Module
    norm: nn.Module | None
    """The norm that computes its input, if there is one."""
    x: Tensor
    """Input of the attention, [1, 1, hidden size]."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    biased: bool
    """Whether the norm or the attention has any bias."""

    def keys(self, attention: nn.Module, x_1NI: Tensor) -> Tensor:
        """Compute the keys [N, H, D] of `attention` for other inputs, called as this call was."""

        def instead(given: Tensor) -> Tensor:
            return x_1NI if given is self.x else given.to(x_1NI.device)

        args, kwargs = tree_map_only(Tensor, instead, (self.args, dict(self.kwargs)))
        try:
            attention(*args, **{**kwargs, "step": _KeysOnly()})
        except _KeysReached as keys:
            return keys.k_NHD
        raise AssertionError("attention did not reach `step` as it did when it was probed")


class _KeysReached(Exception):  # no error: ends a call once K is known
    def __init__(self, k_NHD: Tensor) -> None:
        self.k_NHD = k_NHD


class _KeysOnly:
    """A step that takes the keys and ends the call before anything more is computed."""

    def attend(
        self, module: nn.Module, q_NQD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        raise _KeysReached(k_NHD)


class _CallRecorder:
    """A step that computes nothing and records how attention modules were called."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.calls: dict[int, AttentionCall] = {}
        self._names = {module: name for name, module in model.named_modules()}
        self._given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._made: list[tuple[Tensor, nn.Module]] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given[module] = (args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], out: object) -> None:
        if isinstance(out, Tensor) and not list(module.children()):
            self._made.append((out, module))

    def attend(
        self, module: nn.Module, q_NQD: Tensor, k_NHD: Tensor, v_NHD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        args, kwargs = self._given[module]
        x = next(given for given in (*args, *kwargs.values()) if isinstance(given, Tensor))
        maker = next((maker for made, maker in self._made if made is x), None)
        norm = maker if maker and all(p.dim() == 1 for p in maker.parameters()) else None
        biased = _has_bias(module) or (norm is not None and _has_bias(norm))
        self.calls[layer_index(module)] = AttentionCall(
            self._names[module], module, norm, x, args, kwargs, biased
        )
        return q_NQD.new_zeros(*q_NQD.shape[:2], v_NHD.shape[2])


def _has_bias(module: nn.Module) -> bool:
    return any(name.rpartition(".")[2] == "bias" for name, _ in module.named_parameters())


@torch.inference_mode()
def attention_calls(model: PreTrainedModel) -> tuple[AttentionCall, ...]:
    """Record every layer's attention call in a forward pass of one token; none for a model without any bias.

    Called before products are merged, which hides biases, and before collectives are added.
    """
    if not _has_bias(model):
        return ()
    watch = _CallRecorder(model)
    handles = [m.register_forward_pre_hook(watch.before, with_kwargs=True) for m in model.modules()]
    handles += [m.register_forward_hook(watch.after) for m in model.modules()]
    zero = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=zero, position_ids=zero, use_cache=False, step=watch, logits_to_keep=zero[0])
    for handle in handles:
        handle.remove()
    return tuple(watch.calls[layer] for layer in sorted(watch.calls))


def key_offset(call: AttentionCall, config: PreTrainedConfig, weights: WeightSource, tp: int) -> float:
    """Return the largest ratio, over kv heads, of the norm of K's constant part to that of the rest.

    It covers all heads of the model, so that all ranks agree. `config` is the whole model's.
    """
    if not call.biased:
        return 0.0
    noise = torch.randn(1, _INPUTS, call.x.shape[-1], generator=torch.Generator().manual_seed(0))
    attention = call.attention if tp == 1 else _whole_attention(call, config, weights)
    with torch.inference_mode():
        x_1NI = noise.to(call.x)
        k_NHD = call.keys(attention, call.norm(x_1NI) if call.norm else x_1NI).float()
    mean_HD = k_NHD.mean(0)
    spread_H = (k_NHD - mean_HD).norm(dim=-1).pow(2).mean(0).sqrt()
    return float((mean_HD.norm(dim=-1) / spread_H.clamp_min(1e-12)).max())


def _whole_attention(call: AttentionCall, config: PreTrainedConfig, weights: WeightSource) -> nn.Module:
    """Load the call's attention module with the K heads of all ranks; weights that K does not need are 0."""
    whole = copy.deepcopy(config)
    whole._attn_implementation = ATTENTION
    attention = meta_model(whole).get_submodule(call.name)
    names, parameters = zip(*attention.named_parameters(), strict=True)
    keys = call.keys(attention, call.x.to("meta").expand(1, 2, -1))
    reaching = torch.autograd.grad(keys.sum(), parameters, allow_unused=True)
    for name, parameter, gradient in zip(names, parameters, reaching, strict=True):
        value = torch.zeros(parameter.shape) if gradient is None else weights.read(f"{call.name}.{name}")
        path, _, leaf = name.rpartition(".")
        setattr(attention.get_submodule(path), leaf, nn.Parameter(value.to(call.x), False))
    return attention


def biased_layers(
    formats: Sequence[LayerFormat],
    calls: Sequence[AttentionCall],
    config: PreTrainedConfig,
    weights: WeightSource,
    tp: int,
) -> frozenset[int]:
    """The layers whose keys their format would not resolve without a calibrated transform."""
    return frozenset(
        i
        for i, (call, f) in enumerate(zip(calls, formats, strict=False))
        if f.k.codes in _LIMITS
        and not f.k.transform.affine
        and key_offset(call, config, weights, tp) > _LIMITS[f.k.codes]
    )
