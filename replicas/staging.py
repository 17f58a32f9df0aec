"""One transfer to the device for all the small arrays of a step, which the host does not wait for.

Knows bytes and shapes; what the arrays mean is their owner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

_ALIGN = 16


@dataclass(frozen=True)
class Packing:
    """Where arrays of known types and shapes lie in one run of bytes."""

    shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]

    @staticmethod
    def of(arrays: Mapping[str, Array]) -> Packing:
        return Packing({name: (array.dtype, array.shape) for name, array in arrays.items()})

    @cached_property
    def offsets(self) -> dict[str, int]:
        offsets, at = {}, 0
        for name, (dtype, shape) in self.shapes.items():
            offsets[name] = at
            at += -(-dtype.itemsize * prod(shape) // _ALIGN) * _ALIGN
        return offsets

    @property
    def size_bytes(self) -> int:
        return sum(-(-d.itemsize * prod(shape) // _ALIGN) * _ALIGN for d, shape in self.shapes.values())

    def arrays(self, bytes_B: Tensor) -> dict[str, Array]:
        """Views of a run of bytes in host memory."""
        whole = bytes_B.numpy()
        return {
            name: whole[at : at + dtype.itemsize * prod(shape)].view(dtype).reshape(shape)
            for (name, at), (dtype, shape) in zip(self.offsets.items(), self.shapes.values(), strict=True)
        }

    def tensors(self, bytes_B: Tensor) -> dict[str, Tensor]:
        """Views of a run of bytes on any device."""
        return {
            name: bytes_B[at : at + dtype.itemsize * prod(shape)].view(_TORCH[dtype.str]).view(shape)
            for (name, at), (dtype, shape) in zip(self.offsets.items(), self.shapes.values(), strict=True)
        }


def host_bytes(size: int, device: torch.device) -> Tensor:
    """Host memory from which `device` can copy by itself. A GPU's is page-locked, and comes from torch's
    cache, which hands no memory out again before the copies that read it are done.
    """
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


def stage(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on `device`, in one transfer."""
    packing = Packing.of(arrays)
    host_B = host_bytes(packing.size_bytes, device)
    for name, view in packing.arrays(host_B).items():
        view[...] = arrays[name]
    return packing.tensors(host_B.to(device, non_blocking=True))


_TORCH = {
    np.dtype(np_type).str: torch_type
    for np_type, torch_type in (
        (np.int64, torch.int64),
        (np.int32, torch.int32),
        (np.float64, torch.float64),
        (np.float32, torch.float32),
    )
}
