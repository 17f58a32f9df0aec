"""Products of the same input in one: Q, K and V, and the two halves of an MLP.

At a decode step's few rows a product takes as long as reading its weights, and a small one much longer than
that. The model's code stays as transformers wrote it: its projections become parts of one product, which the
first of them to be called computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one input, in the order of their calls."""


class _Product:
    """One product; between its first part's call and its last one's it holds what it was asked for."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._x: Tensor | None = None
        self._out: Tensor | None = None

    def of(self, x: Tensor, *, last: bool) -> Tensor:
        """Computed anew for any other `x` than the last caller's, so that no order of calls can be wrong."""
        out = self._out
        if self._x is not x or out is None:
            out = F.linear(x, self._weight, self._bias)
        self._x, self._out = (None, None) if last else (x, out)
        return out


class _Part(nn.Module):
    """What was a linear layer: some columns of a product."""

    def __init__(self, product: _Product, at: int, weight: Tensor, *, last: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, False)
        self._product, self._last = product, last
        self._columns = slice(at, at + weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self._product.of(x, last=self._last)[..., self._columns]

    def release(self) -> None:
        del self._product


def merge_products(model: PreTrainedModel) -> None:
    """Merge sibling projections wherever all are plain linear layers without hooks. Their memory is moved."""
    for module in list(model.modules()):
        for names in _SIBLINGS:
            siblings = [getattr(module, name, None) for name in names]
            linears = [s for s in siblings if isinstance(s, nn.Linear) and not s._forward_hooks]
            with_bias = {linear.bias is not None for linear in linears}
            if len(linears) == len(names) and len(with_bias) == 1:
                _merge(module, names, linears)


def release_products(model: nn.Module) -> None:
    """Give the merged weights up: no part can be called afterwards."""
    for module in model.modules():
        if isinstance(module, _Part):
            module.release()


def _merge(module: nn.Module, names: tuple[str, ...], linears: list[nn.Linear]) -> None:
    weight = torch.cat([linear.weight.data for linear in linears])
    biases = [linear.bias.data for linear in linears if linear.bias is not None]
    product = _Product(weight, torch.cat(biases) if biases else None)
    at = 0
    for name, linear in zip(names, linears, strict=True):
        part = weight[at : at + linear.out_features]
        setattr(module, name, _Part(product, at, part, last=name == names[-1]))
        at += linear.out_features
