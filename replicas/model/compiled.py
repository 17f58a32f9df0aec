"""torch.compile for everything in a layer but its attention: norms, RoPE and activations become few kernels.

All layers share one piece of compiled code, in which attention is one opaque operator. What that needs beside
q, k and v (pages, lengths, plans, the layer) is bound when a step begins, so that the code is the same for
every layer, step and batch size.

Names: T tokens, Q query heads, H kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quire.kernels.cache_view import AttentionSpec
from quire.replicas.errors import ModelNotServable

MIN_TOKENS = 2
"""Compiled code takes any number of tokens but 0 and 1, which torch would compile separately."""

_numbers = count()  # torch's registry of operators is global: names are unique, and equal in every process


class LayerSteps(Protocol):
    """A step that is told layers by number."""

    def attend_layer(
        self, layer: int, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Compute attention outputs [T, Q, D] of one layer."""


class OpaqueAttention:
    """The `step` of a compiled model, which forwards to the real one while that runs.

    Layers are counted in the order of their calls: code that named its layer would be compiled for each.
    """

    def __init__(self) -> None:
        self._step: LayerSteps | None = None
        self._layer = 0
        operator = torch.library.custom_op(f"quire::attend_{next(_numbers)}", self._attend, mutates_args=())
        operator.register_fake(_like_queries)
        self._operator = operator

    @contextmanager
    def bound(self, step: LayerSteps) -> Iterator[OpaqueAttention]:
        """Forward attention to `step`, from its first layer on, while the context lasts."""
        self._step, self._layer = step, 0
        try:
            yield self
        finally:
            self._step = None

    def attend(
        self, module: nn.Module, q_TQD: Tensor, k_THD: Tensor, v_THD: Tensor, spec: AttentionSpec
    ) -> Tensor:
        out_TQD: Tensor = self._operator(
            q_TQD, k_THD, v_THD, spec.scale, spec.window or 0, spec.softcap or 0.0
        )
        return out_TQD

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
        assert self._step is not None, "a compiled layer ran outside of a step"
        layer, self._layer = self._layer, self._layer + 1
        spec = AttentionSpec(scale, window or None, softcap or None)
        return self._step.attend_layer(layer, q, k, v, spec).contiguous()  # as `_like_queries` promises


def _like_queries(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    return q.new_empty(q.shape)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile the model's layers, at the first call, for any number of tokens. Raises ModelNotServable.

    torch keeps compiled kernels on disk for the next start.
    """
    count = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise ModelNotServable(
            f"{type(model).__name__} does not keep its {count} layers in one list, so they cannot be "
            "compiled; set gpu.compile to false"
        )
    # torch keeps few compiled versions of a code object, and every model of a process needs its own.
    own = FunctionType(_call.__code__.replace(), globals())
    compiled = torch.compile(own, fullgraph=True, dynamic=True)
    for layer in lists[0]:
        layer.forward = partial(compiled, layer.forward)


def _call(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)
