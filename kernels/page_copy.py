"""Whole pages as bytes: gathered for a message, scattered from one, and their checksums.

Legend: see `cache_view.py`; here W words of a page, K words of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels import cpu

_WORD = 4
_CHUNK_WORDS = 1024  # 32-bit words a program copies and sums


def gather_pages(
    pool_NB: Tensor, pages_M: Tensor, out_MB: Tensor | None = None, sum_M: Tensor | None = None
) -> Tensor:
    """Copy the bytes of the given pages, one after the other: uint8 [M, B], into `out_MB` if given.

    The pool may be a range of columns of a larger one: the bytes of some heads of every page.
    The pages' checksums are added to `sum_M`, int64, if given.
    """
    if out_MB is None:
        out_MB = pool_NB.new_empty((pages_M.shape[0], pool_NB.shape[1]))
    _check(pool_NB, pages_M, out_MB)
    _copy(pool_NB, pages_M, out_MB, sum_M, scatter=False)
    return out_MB


def scatter_pages(pool_NB: Tensor, pages_M: Tensor, bytes_MB: Tensor, sum_M: Tensor | None = None) -> None:
    """Write what `gather_pages` returned into the given pages, which must be distinct; `sum_M` as there."""
    bytes_MB = bytes_MB.contiguous()
    _check(pool_NB, pages_M, bytes_MB)
    _copy(pool_NB, pages_M, bytes_MB, sum_M, scatter=True)


def _copy(pool_NB: Tensor, pages_M: Tensor, bytes_MB: Tensor, sum_M: Tensor | None, *, scatter: bool) -> None:
    if pool_NB.device.type != "cpu":
        launch_copy(pool_NB, bytes_MB, pages_M, scatter=scatter, sum_M=sum_M)
        return
    if cpu.copy_pages(pool_NB, pages_M, bytes_MB, sum_M, scatter=scatter):
        return
    if scatter:
        pool_NB[pages_M.long()] = bytes_MB
    else:
        torch.index_select(pool_NB, 0, pages_M.long(), out=bytes_MB)
    if sum_M is not None:
        sum_M += checksum_pages(bytes_MB)


def _check(pool_NB: Tensor, pages_M: Tensor, bytes_MB: Tensor) -> None:
    expected = (pages_M.shape[0], pool_NB.shape[1])
    if bytes_MB.shape != expected or bytes_MB.dtype != torch.uint8 or not bytes_MB.is_contiguous():
        raise ValueError(
            f"{expected[0]} pages of {expected[1]} bytes are contiguous uint8 {list(expected)}, "
            f"got {bytes_MB.dtype} {tuple(bytes_MB.shape)}"
        )


def checksum_pages(bytes_MB: Tensor) -> Tensor:
    """Compute a 64-bit checksum per page, int64 [M]: the same on every device and machine.

    The sum over the page's 32-bit words w, unsigned, of (w + 1) (4x**2 + 6x + 1) modulo 2**64, where x counts
    words from the page's end: additions only for a reader that goes through them in order. It always detects
    a change confined to one word, and two words exchanged (a weight is odd, and two of them differ by
    twice an odd multiple of the words' distance); it misses other damage about once in 2**32 times.
    It guards against accidents, not against an adversary.
    """
    if bytes_MB.shape[1] % _WORD:
        raise ValueError(f"a page is a multiple of {_WORD} bytes, got {bytes_MB.shape[1]}")
    bytes_MB = bytes_MB.contiguous()
    if bytes_MB.device.type == "cpu":
        return _checksum_cpu(bytes_MB)
    return launch_checksum(bytes_MB)


def launch_copy(
    pool_NB: Tensor, bytes_MB: Tensor, pages_M: Tensor, *, scatter: bool, sum_M: Tensor | None = None
) -> None:
    """Copy between pool and contiguous `bytes_MB`; sizes, strides and offsets are multiples of 8 bytes."""
    pages, words, stride = pages_M.shape[0], pool_NB.shape[1] // 8, pool_NB.stride(0) // 8
    copy_kernel[(pages, triton.cdiv(words, _CHUNK_WORDS // 2))](
        *(pool_NB.view(torch.int64), bytes_MB.view(torch.int64), pages_M, words, stride),
        *(sum_M, 0 if sum_M is None else sum_M.stride(0)),
        SCATTER=scatter,
        W=_CHUNK_WORDS // 2,
    )


def launch_checksum(bytes_MB: Tensor) -> Tensor:
    """Launch one program per page and chunk; integer sums do not depend on their order."""
    pages, words = bytes_MB.shape[0], bytes_MB.shape[1] // _WORD
    sum_M = torch.zeros(pages, dtype=torch.int64, device=bytes_MB.device)
    _checksum_kernel[(pages, triton.cdiv(words, _CHUNK_WORDS))](
        bytes_MB.view(torch.int32), sum_M, words, K=_CHUNK_WORDS
    )
    return sum_M


def _checksum_cpu(bytes_MB: Tensor) -> Tensor:
    if (compiled_M := cpu.checksum_pages(bytes_MB)) is not None:
        return compiled_M
    words_MW = bytes_MB.view(torch.int32)
    x_W = torch.arange(words_MW.shape[1], 0, -1)
    sum_M = torch.zeros(bytes_MB.shape[0], dtype=torch.int64)
    chunks = zip(words_MW.split(_CHUNK_WORDS, 1), x_W.split(_CHUNK_WORDS), strict=True)
    for words_MK, x_K in chunks:  # so that products stay in the cache
        terms_MK = ((words_MK.long() & 0xFFFFFFFF) + 1) * ((4 * x_K + 6) * x_K + 1)
        sum_M += terms_MK.sum(1)
    return sum_M


@triton.jit
def _weight(x):
    """See `checksum_pages`."""
    return (4 * x + 6) * x + 1


@triton.jit
def copy_kernel(
    pool_ptr, bytes_ptr, pages_ptr, words, stride, sum_ptr, sum_stride,
    SCATTER: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Grid (pages, chunks); words of 64 bits. `sum_ptr`: None, or where the checksums are added."""
    i, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    page = tl.load(pages_ptr + i).to(tl.int64)
    word_W = chunk * W + tl.arange(0, W)
    inside_W = word_W < words
    pool_ptr_W, bytes_ptr_W = pool_ptr + page * stride + word_W, bytes_ptr + i * words + word_W
    data_W = tl.load(bytes_ptr_W if SCATTER else pool_ptr_W, mask=inside_W, other=0)
    tl.store(pool_ptr_W if SCATTER else bytes_ptr_W, data_W, mask=inside_W)
    if sum_ptr is not None:
        x_W = 2 * (words - word_W).to(tl.int64)
        low_W = ((data_W & 0xFFFFFFFF) + 1) * _weight(x_W)
        high_W = (((data_W >> 32) & 0xFFFFFFFF) + 1) * _weight(x_W - 1)
        tl.atomic_add(sum_ptr + i * sum_stride, tl.sum(tl.where(inside_W, low_W + high_W, 0), 0))


@triton.jit
def _checksum_kernel(words_ptr, sum_ptr, words, K: tl.constexpr):
    """Grid (pages, chunks); words of 32 bits."""
    page, at_K = tl.program_id(0).to(tl.int64), tl.program_id(1) * K + tl.arange(0, K)
    inside_K = at_K < words
    word_K = tl.load(words_ptr + page * words + at_K, mask=inside_K, other=0)
    term_K = ((word_K.to(tl.int64) & 0xFFFFFFFF) + 1) * _weight((words - at_K).to(tl.int64))
    tl.atomic_add(sum_ptr + page, tl.sum(tl.where(inside_K, term_K, 0), 0))
