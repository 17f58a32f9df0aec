"""The static affine map between what the model computes and what a page stores.

    K:  k' = R((k - shift) / scale)      q' = R(q * scale)         q'.k' = q.k - q.shift
    V:  v' = R((v - shift) / scale)      o  = R(o') * scale + shift

R is the identity or a normalized (block) Hadamard rotation; R = R^-1. `q.shift` is the same for every key
of a query, so softmax cancels it and nothing is undone at read time. That does not hold under a logit
soft-cap, where a shift of K is refused. Static per-head and per-channel code scales are this map's
`scale`. Fixed at load; its fingerprint is part of every block key.

Tensor legend: T tokens, H kv heads, Q query heads, D head_dim.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from quire.kernels.formats import FormatError, KVFormat, Scales, Transform


@dataclass(frozen=True, eq=False)
class SideTransform:
    """The map of one side of one layer, for the kv heads of a shard or of the whole model."""

    rotate: bool = False
    shift_HD: Tensor | None = None
    """fp32 or None (zero)."""
    scale_HD: Tensor | None = None
    """fp32, positive, or None (one). Static code scales are folded in."""

    @property
    def identity(self) -> bool:
        return not self.rotate and self.shift_HD is None and self.scale_HD is None

    def store(self, x_THD: Tensor) -> Tensor:
        """Map numbers to what a page stores, fp32, before rounding to codes."""
        x = x_THD.float()
        if self.shift_HD is not None:
            x = x - self.shift_HD
        if self.scale_HD is not None:
            x = x / self.scale_HD
        return rotate(x) if self.rotate else x

    def query(self, q_TQD: Tensor) -> Tensor:
        """Map queries to what is multiplied with stored keys, fp32."""
        q = q_TQD.float()
        if self.scale_HD is not None:
            q = q * _per_query_head(self.scale_HD, q_TQD.shape[1])
        return rotate(q) if self.rotate else q

    def output(self, o_TQD: Tensor) -> Tensor:
        """Map a mean of stored values to the model's attention output, fp32."""
        o = rotate(o_TQD.float()) if self.rotate else o_TQD.float()
        if self.scale_HD is not None:
            o = o * _per_query_head(self.scale_HD, o_TQD.shape[1])
        if self.shift_HD is not None:
            o = o + _per_query_head(self.shift_HD, o_TQD.shape[1])
        return o

    def of_heads(self, heads: slice, device: torch.device) -> SideTransform:
        """Return the map of some of the heads, its tensors on `device`."""
        tensors = (self.shift_HD, self.scale_HD)
        return SideTransform(self.rotate, *(None if x is None else x[heads].to(device) for x in tensors))

    @cached_property
    def fingerprint(self) -> bytes:
        digest = hashlib.blake2b(f"rotate={self.rotate}".encode(), digest_size=32)
        for part in (self.shift_HD, self.scale_HD):
            digest.update(b"-" if part is None else part.float().cpu().contiguous().numpy().tobytes())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class LayerTransform:
    """The maps of both sides of one layer."""

    k: SideTransform
    v: SideTransform

    def of_heads(self, heads: slice, device: torch.device) -> LayerTransform:
        """Return both maps of some of the heads, their tensors on `device`."""
        return LayerTransform(self.k.of_heads(heads, device), self.v.of_heads(heads, device))


def default_transform(fmt: KVFormat) -> SideTransform:
    """Return the map that a format needs without calibration.

    fp8 gets a static scale of 1. Raises FormatError where a calibration is needed.
    """
    if fmt.transform.affine:
        raise FormatError(
            f"{fmt.codes} with a static {fmt.transform} transform needs calibrated shifts and scales; "
            "run `quire calibrate` and pass the policy that it writes"
        )
    if fmt.scales is Scales.STATIC and fmt.codes.value != "fp8":
        raise FormatError(f"static {fmt.codes} scales need a calibration; choose dynamic ones (scales=token)")
    return SideTransform(rotate=fmt.transform is Transform.HADAMARD)


@lru_cache(maxsize=64)
def hadamard(head_dim: int, device: torch.device) -> Tensor:
    """Build the fp32 rotation [D, D], symmetric, orthogonal, of blocks of the largest 2**n that divides D."""
    size = head_dim & -head_dim
    block = torch.ones(1, 1)
    while block.shape[0] < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    blocks = [block / math.sqrt(size)] * (head_dim // size)
    rotation: Tensor = torch.block_diag(*blocks)
    return rotation.to(device)


def rotate(x: Tensor) -> Tensor:
    """Rotate along the last axis, in fp32."""
    return x @ hadamard(x.shape[-1], x.device)


def _per_query_head(x_HD: Tensor, query_heads: int) -> Tensor:
    return x_HD.repeat_interleave(query_heads // x_HD.shape[0], 0)
