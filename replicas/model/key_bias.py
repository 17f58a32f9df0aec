"""Finds the layers whose keys a large bias would drown in a low-bit format.

Models of the Qwen2 family add a bias to K that is many times what the weights produce, on some layers. One
scale per token then resolves the bias and rounds the rest away. RoPE turns the bias with the position, so
no static shift removes it; such layers keep K in bf16.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from quire.kernels.formats import Codes, LayerFormat, named_format
from quire.replicas.model.checkpoint import WeightSource

_LOG = logging.getLogger(__name__)

_LIMITS = {Codes.INT8: 8.0, Codes.FP8: 8.0, Codes.INT4: 2.0}
"""How many times a typical key's norm the bias may reach. Rounding noise is about 0.026 (int8) and 0.12
(int4, rotated) of the norm of what is stored, at head_dim 128: the limits keep it near a fifth of the key."""


def bias_ratio(checkpoint: WeightSource, layer: int, head_dim: int) -> float:
    """Largest norm of a kv head's K bias over the norm that its weights give a typical key; 0 without bias.

    Looks at the whole model's tensors, so that every rank comes to the same result. A typical input is one
    whose elements have the size of the layer's norm weights.
    """
    prefix = f"model.layers.{layer}."
    name = f"{prefix}self_attn.k_proj."
    if name + "bias" not in checkpoint:
        return 0.0
    weight_KI, bias_K = checkpoint.read(name + "weight").float(), checkpoint.read(name + "bias").float()
    norm = prefix + "input_layernorm.weight"
    gain_I = checkpoint.read(norm).float() if norm in checkpoint else torch.ones(weight_KI.shape[1])
    typical_H = (weight_KI * gain_I).view(-1, head_dim * gain_I.numel()).norm(dim=1)
    bias_H = bias_K.view(-1, head_dim).norm(dim=1)
    return float((bias_H / typical_H.clamp_min(1e-12)).max())


def risky_key_layers(
    checkpoint: WeightSource, formats: tuple[LayerFormat, ...], head_dim: int
) -> dict[int, float]:
    """Layers whose K format is too coarse for their bias, with `bias_ratio`."""
    ratios = {i: bias_ratio(checkpoint, i, head_dim) for i, f in enumerate(formats) if f.k.codes in _LIMITS}
    return {i: ratio for i, ratio in ratios.items() if ratio > _LIMITS[formats[i].k.codes]}


def with_safe_keys(
    checkpoint: WeightSource, formats: tuple[LayerFormat, ...], head_dim: int
) -> tuple[LayerFormat, ...]:
    """The formats with bf16 keys on the risky layers; says so in the log."""
    risky = risky_key_layers(checkpoint, formats, head_dim)
    if risky:
        _LOG.warning(
            "layers %s keep K in bf16: their k_proj bias is %.0f times a typical key and more, which %s "
            "would not resolve",
            ", ".join(map(str, risky)),
            min(risky.values()),
            "/".join(sorted({formats[i].k.codes for i in risky})),
        )
    bf16 = named_format("bf16")
    return tuple(replace(f, k=bf16) if i in risky else f for i, f in enumerate(formats))
