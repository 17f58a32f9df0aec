"""Triton's interpreter with what it gets wrong put right, so that kernels can be compared without a GPU.

For a process with TRITON_INTERPRET=1, which Triton reads where a kernel is decorated. Measured wrong in
triton 3.6 and 3.9, and repaired here: arithmetic, dots and casts of bf16 work on the raw 16-bit patterns;
casts to bf16 and fp8 do not round to nearest even; in 3.6 a loop bound read from
memory is refused, and a minimum takes the NaN rather than the number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
_BITS = {tl.bfloat16: (np.uint16, torch.int16), tl.float8e4nv: (np.uint8, torch.uint8)}
_FP8_MAX = 448.0


def _floats(handle: Any) -> np.ndarray:
    """A tensor's numbers as fp32."""
    kind = handle.dtype.scalar
    if kind not in _TORCH:
        return handle.data.astype(np.float32)
    bits, same_width = _BITS[kind]
    raw = torch.from_numpy(handle.data.astype(bits).view(np.int16 if bits is np.uint16 else bits))
    return raw.to(same_width).view(_TORCH[kind]).float().numpy()


def _handle(numbers: np.ndarray, kind: Any) -> Any:
    """fp32 numbers as a tensor of `kind`, rounded to nearest even; fp8 saturates."""
    if kind not in _TORCH:
        return interpreter.TensorHandle(numbers.astype(interpreter._get_np_dtype(kind)), kind)
    x = torch.from_numpy(np.array(numbers, dtype=np.float32))
    if kind == tl.float8e4nv:
        x = x.clamp(-_FP8_MAX, _FP8_MAX)
    raw = x.to(_TORCH[kind]).view(_BITS[kind][1]).numpy()
    return interpreter.TensorHandle(raw.view(_BITS[kind][0]), kind)


def _narrow(*handles: Any) -> bool:
    return any(h.dtype.scalar in _TORCH for h in handles)


def _repaired(method: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """An elementwise method `(self, *operands, numpy function)` that computes narrow floats in fp32."""

    def call(self: Any, *args: Any) -> Any:
        handles, op = args[:operands], args[operands]
        if not _narrow(*handles):
            return method(self, *args)
        with np.errstate(all="ignore"):
            out = op(*(_floats(h) for h in handles))
        if out.dtype == np.bool_:
            return interpreter.TensorHandle(out, tl.int1)
        return _handle(out, handles[-1].dtype.scalar)

    return call


def _repaired_cast(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, source: Any, to: Any, *rest: Any) -> Any:
        if source.dtype.scalar != to.scalar and (_narrow(source) or to.scalar in _TORCH):
            return _handle(_floats(source), to.scalar)
        return method(self, source, to, *rest)

    return call


def _repaired_dot(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        if not _narrow(a, b):
            return method(self, a, b, acc, *rest)
        out = np.matmul(_floats(a), _floats(b)).astype(acc.data.dtype) + acc.data
        return interpreter.TensorHandle(out, acc.dtype.scalar)

    return call


def _with_index(patch: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return call


def repair() -> None:
    """Once per process."""
    builder = interpreter.InterpreterBuilder
    builder.unary_op = _repaired(builder.unary_op, 1)
    builder.binary_op = _repaired(builder.binary_op, 2)
    builder.ternary_op = _repaired(builder.ternary_op, 3)
    builder.cast_impl = _repaired_cast(builder.cast_impl)
    builder.create_fp_to_fp = _repaired_cast(builder.create_fp_to_fp)
    builder.create_dot = _repaired_dot(builder.create_dot)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
