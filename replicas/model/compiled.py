"""torch.compile for all of a model but its attention: norms, rotations and activations become few kernels.

Attention stays one opaque operator per layer. Whatever it needs beside q, k and v (pages, lengths, plans) is
bound when a step begins, so that the compiled code is the same for every step and batch size.

Names: T tokens, Q query heads, H kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quire.kernels.paged import AttentionSpec
from quire.replicas.errors import ModelNotServable
from quire.replicas.model.attention import AttentionStep

LEAST_TOKENS = 2
"""Compiled code takes any number of tokens but 0 and 1, which torch would compile anew."""

_numbers = count()  # operators' names are unique in a process and the same in every process


class OpaqueAttention:
    """The `step` that a compiled model is given, with the real one bound to it while a step runs."""

    def __init__(self) -> None:
        self._step: AttentionStep | None = None
        operator = torch.library.custom_op(f"quire::attend_{next(_numbers)}", self._attend, mutates_args=())
        operator.register_fake(_like_queries)
        self._operator = operator

    @contextmanager
    def bound(self, step: AttentionStep) -> Iterator[OpaqueAttention]:
        """While this lasts, attention is the given step's."""
        self._step = step
        try:
            yield self
        finally:
            self._step = None

    def attend(self, layer: int, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec) -> Tensor:
        window, softcap = spec.window or 0, spec.softcap or 0.0
        out_TQD: Tensor = self._operator(q_TQD, k_THD, v_THD, layer, spec.scale, window, softcap)
        return out_TQD

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int, softcap: float
    ) -> Tensor:
        assert self._step is not None, "a compiled model ran outside of a step"
        spec = AttentionSpec(scale, window or None, softcap or None)
        return self._step.attend(layer, q, k, v, spec).contiguous()  # as `_like_queries` promises


def _like_queries(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, window: int, softcap: float
) -> Tensor:
    return q.new_empty(q.shape)


def compile_model(model: PreTrainedModel) -> None:
    """Compile the decoder under the output head, at its first call; its code serves any number of tokens.

    Compiled kernels are kept on disk by torch, for the next start. Raises ModelNotServable.
    """
    decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(decoder, torch.nn.Module):
        raise ModelNotServable(
            f"{type(model).__name__} has no decoder of its own to compile; set gpu.compile to false"
        )
    # torch keeps few compiled versions of a code object, and every model of a process needs its own.
    own = FunctionType(_call.__code__.replace(), globals())
    compiled = torch.compile(own, fullgraph=True, dynamic=True)
    decoder.forward = partial(compiled, decoder.forward)


def _call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)
