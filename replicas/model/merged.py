"""Merges projections of the same input into one matrix product: Q, K and V, and the two halves of an MLP.

With a decode step's few rows, a product takes as long as reading its weights, and a small one much longer.
The model's code stays transformers': its projections become parts of one product, which the first call
computes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections of one input, in the order of their calls."""


class _Product:
    """One product, which keeps its result from the call of its first part to that of its last."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias
        self._x: Tensor | None = None
        self._out: Tensor | None = None

    def of(self, x: Tensor, *, last: bool) -> Tensor:
        """Compute the product unless `x` is the last call's, so that calls are correct in any order."""
        out = self._out
        if self._x is not x or out is None:
            out = F.linear(x, self._weight, self._bias)
        self._x, self._out = (None, None) if last else (x, out)
        return out


class _Part(nn.Module):
    """A linear layer that became some columns of a product."""

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
    """Merge sibling projections where all are plain linear layers without hooks; this moves their weights."""
    for module in list(model.modules()):
        for names in _SIBLINGS:
            siblings = [getattr(module, name, None) for name in names]
            linears = [s for s in siblings if isinstance(s, nn.Linear) and not s._forward_hooks]
            with_bias = {linear.bias is not None for linear in linears}
            if len(linears) == len(names) and len(with_bias) == 1:
                _merge(module, names, linears)


def release_products(model: nn.Module) -> None:
    """Free the merged weights; no part can be called afterwards."""
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
