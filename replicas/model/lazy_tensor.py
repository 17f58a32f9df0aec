"""Tensors that are read from disk only when their numbers are needed.

transformers' conversions of checkpoints run on them. Reading a part of a concatenated, split or transposed
tensor reads only that part of its sources; any other operation runs on whole tensors when its result is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten

Index = tuple[slice, ...]
"""A start and a stop for every dimension."""


class LazyTensor(torch.Tensor):
    """A tensor of known shape and type, with a function that reads its numbers."""

    read: Callable[[Index], Tensor]
    """Reads the part at an index."""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, read: Callable[[Index], Tensor]) -> LazyTensor:
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return LazyTensor._like(meta, read)

    @staticmethod
    def _like(meta: Tensor, read: Callable[[Index], Tensor]) -> LazyTensor:
        unread: LazyTensor = torch.Tensor._make_wrapper_subclass(
            LazyTensor, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=torch.device("cpu")
        )
        unread.read = read
        return unread

    def whole(self) -> Tensor:
        """Read all of it, with the strides that operations were told."""
        numbers = self.read(tuple(slice(0, n) for n in self.shape))
        if numbers.stride() == self.stride():
            return numbers
        return torch.empty_strided(self.shape, self.stride(), dtype=self.dtype).copy_(numbers)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own stub is of a disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        metas = tree_map_only(LazyTensor, _meta, (args, kwargs))
        made = func(*metas[0], **metas[1])
        operation = _Operation(func, args, kwargs)
        if isinstance(made, Tensor):
            return cls._like(made, operation.reader(made.shape))
        return [cls._like(piece, operation.reader(piece.shape, i)) for i, piece in enumerate(made)]


def _meta(unread: LazyTensor) -> Tensor:
    return torch.empty_strided(unread.shape, unread.stride(), dtype=unread.dtype, device="meta")


@dataclass(frozen=True)
class _Operation:
    """A call that runs when its result is read."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def reader(self, shape: torch.Size, piece: int = 0) -> Callable[[Index], Tensor]:
        """Return a function that reads the result, or one of several."""
        rank, args = len(shape), self.args
        match self.func:
            case _ATEN.cat.default:
                dim = _dim(args[1] if len(args) > 1 else self.kwargs.get("dim", 0), rank)
                return lambda index: _read_joined(args[0], dim, index)
            case _ATEN.stack.default:
                dim = _dim(args[1] if len(args) > 1 else self.kwargs.get("dim", 0), rank)
                return lambda index: _read_stacked(args[0], dim, index)
            case _ATEN.split.Tensor | _ATEN.split_with_sizes.default:
                dim = _dim(args[2] if len(args) > 2 else self.kwargs.get("dim", 0), rank)
                sizes = [args[1]] * piece if isinstance(args[1], int) else list(args[1])[:piece]
                return lambda index: args[0].read(_moved(index, dim, sum(sizes)))
            case _ATEN.transpose.int:
                a, b = _dim(args[1], rank), _dim(args[2], rank)
                return lambda index: args[0].read(_swapped(index, a, b)).transpose(a, b)
            case _ATEN.clone.default:
                return lambda index: args[0].read(index).contiguous()
        return lambda index: self._done(piece)[index]

    def _done(self, piece: int) -> Tensor:
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.whole, (self.args, self.kwargs))
        made = self.func(*args, **kwargs)
        done: Tensor = made if isinstance(made, Tensor) else made[piece]
        return done


def _dim(dim: int, rank: int) -> int:
    return dim % rank


def _moved(index: Index, dim: int, by: int) -> Index:
    moved = slice(index[dim].start + by, index[dim].stop + by)
    return (*index[:dim], moved, *index[dim + 1 :])


def _swapped(index: Index, a: int, b: int) -> Index:
    swapped = list(index)
    swapped[a], swapped[b] = index[b], index[a]
    return tuple(swapped)


def _read_joined(pieces: Sequence[LazyTensor], dim: int, index: Index) -> Tensor:
    parts, at = [], 0
    for piece in pieces:
        size = piece.shape[dim]
        start, stop = max(index[dim].start - at, 0), min(index[dim].stop - at, size)
        if start < stop:
            parts.append(piece.read((*index[:dim], slice(start, stop), *index[dim + 1 :])))
        at += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _read_stacked(pieces: Sequence[LazyTensor], dim: int, index: Index) -> Tensor:
    others = (*index[:dim], *index[dim + 1 :])
    return torch.stack([piece.read(others) for piece in pieces[index[dim]]], dim)
