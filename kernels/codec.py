"""Quantizing numbers to codes and back: the definition that every kernel must agree with.

Works on one side of one cell, `[..., P, D]` fp32 numbers (P tokens, D head_dim) that `transform.py` has
already mapped. Bytes are returned exactly as a page stores them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels.formats import Codes, KVFormat, Scales

FP8_MAX = 448.0
_MIN_SCALE = 2.0**-24  # the smallest fp16 above zero: a token of zeros must not divide by zero


def encode(x: Tensor, fmt: KVFormat) -> tuple[Tensor, Tensor | None]:
    """Quantize `x` [..., P, D] to codes and dynamic scales.

    Returns: codes uint8 [..., P, bytes per token], not yet transposed;
    scales uint8 [..., groups, P, scale_bytes] or None.
    NaN and infinity are stored as they are by fp32 and bf16, as saturated or zero codes by the others.
    """
    if fmt.codes is Codes.FP32:
        return _bytes(x.float()), None
    if fmt.codes is Codes.BF16:
        return _bytes(x.bfloat16()), None
    x = x.float().nan_to_num(nan=0.0)
    if fmt.scales is Scales.STATIC:
        return _encode_static(x, fmt.codes), None
    groups = fmt.groups(x.shape[-1])
    g = x.unflatten(-1, (groups, -1))
    if fmt.codes is Codes.INT4:
        low, high = g.amin(-1).clamp_max(0), g.amax(-1).clamp_min(0)
        scale = _fp16_scale((high - low) / 15)
        zero = (-low / scale).round().clamp(0, 15)
        q = (g / scale[..., None] + zero[..., None]).round().clamp(0, 15).flatten(-2)
        entry = torch.stack([scale, zero], -1)  # [..., P, groups, 2]
        return _pack_nibbles(q), _bytes(entry.movedim(-2, -3).half())
    top = 127 if fmt.codes is Codes.INT8 else FP8_MAX
    scale = _fp16_scale(g.abs().amax(-1) / top)
    codes = _encode_static((g / scale[..., None]).flatten(-2), fmt.codes)
    return codes, _bytes(scale.movedim(-1, -2)[..., None].half())


def decode(codes: Tensor, scales: Tensor | None, fmt: KVFormat, head_dim: int) -> Tensor:
    """Dequantize what `encode` returned: fp32 [..., P, D]."""
    if fmt.codes is Codes.FP32:
        return _view(codes, torch.float32)
    if fmt.codes is Codes.BF16:
        return _view(codes, torch.bfloat16).float()
    if fmt.codes is Codes.FP8:
        q = _view(codes, torch.float8_e4m3fn).float()
    elif fmt.codes is Codes.INT8:
        q = codes.float() - 128
    else:
        q = torch.cat([codes & 15, codes >> 4], -1).float()
    if scales is None:
        return q - 8 if fmt.codes is Codes.INT4 else q
    groups = fmt.groups(head_dim)
    q = q.unflatten(-1, (groups, -1))
    entry = _view(scales, torch.float16).float().movedim(-3, -2)  # [..., P, groups, 1 or 2]
    if fmt.codes is Codes.INT4:
        q = q - entry[..., 1:]
    numbers: Tensor = q * entry[..., :1]
    return numbers.flatten(-2)


def _encode_static(x: Tensor, codes: Codes) -> Tensor:
    """Quantize with scale 1: the static transform has already divided."""
    if codes is Codes.FP8:
        return _bytes(x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))
    if codes is Codes.INT8:
        return (x.round().clamp(-127, 127) + 128).to(torch.uint8)
    return _pack_nibbles(x.round().clamp(-7, 7) + 8)


def _fp16_scale(scale: Tensor) -> Tensor:
    """Round scales to fp16 first, so that writer and reader use the same number."""
    return scale.clamp(_MIN_SCALE, 65504.0).half().float()


def _pack_nibbles(q: Tensor) -> Tensor:
    """Pack nibbles half-split: byte j = element j (low nibble) | element j + D/2 (high nibble)."""
    low, high = q.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _view(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.contiguous().view(dtype)
