"""The operations on pages as a CPU serves them: `cpu.cpp`, compiled once for this machine.

Where no C++ compiler is found the references of `ref/paged.py` serve instead: the same numbers, many times
slower. `backend()` tells which. Decodes and prefill chunks are one function, and with the compiled code a
query row's result has the same bits whatever else is in the batch.

Legend: see `cache_view.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_bool, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache as once
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quire.kernels.cache_view import AttentionSpec, LayerCache, PagedBatch
from quire.kernels.formats import Codes, FormatError, KVFormat
from quire.kernels.ref.paged import attend_ref, write_kv_ref
from quire.kernels.transform import SideTransform

_LOG = logging.getLogger(__name__)
_SOURCES = ("cpu.cpp", "cpu_cells.h", "cpu_pages.h", "cpu_vectors.h")
_FLAGS = (
    *("-std=gnu++17", "-O3", "-march=native", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),  # change no result; never -ffast-math
)
_CODES = {codes: number for number, codes in enumerate(Codes)}  # as the C++ enum numbers them
_MAX_HEAD_DIM = 1024


def backend() -> Literal["c++", "reference"]:
    """Tell which code serves pages on this machine's CPU. The first call compiles (a few seconds)."""
    return "reference" if _library() is None else "c++"


def write_kv(cache: LayerCache, k_THD: Tensor, v_THD: Tensor, slots_T: Tensor) -> None:
    """Transform, quantize and store each token's K and V at its slot; a slot of -1 stores nothing.

    K and V are of any float type. Raises IndexError for a slot outside the pool; then nothing is stored.
    """
    library = _library()
    if library is None:
        write_kv_ref(cache, k_THD, v_THD, slots_T)
        return
    expected = (slots_T.shape[0], cache.layout.kv_heads, cache.layout.head_dim)
    if k_THD.shape != expected or v_THD.shape != expected:
        raise ValueError(f"K and V must be {expected}, got {tuple(k_THD.shape)} and {tuple(v_THD.shape)}")
    k_THD, v_THD, slots_T = _dense_rows(k_THD), _dense_rows(v_THD), slots_T.to(torch.int64).contiguous()
    native = _Cache.of(cache)
    k, v = _Rows.of(k_THD), _Rows.of(v_THD)
    tokens, threads = slots_T.shape[0], torch.get_num_threads()
    if not library.quire_write(byref(native), byref(k), byref(v), slots_T.data_ptr(), tokens, threads):
        raise IndexError(f"a slot of {slots_T.tolist()} is outside the pool's {cache.pool_NB.shape[0]} pages")


def attend(cache: LayerCache, q_TQD: Tensor, batch: PagedBatch, spec: AttentionSpec) -> Tensor:
    """Causal attention of every query row over its sequence's pages: [T, Q, D] of q's type.

    Computed in fp32. Rows that belong to no sequence come out as zeros.
    Raises IndexError if the batch names query rows or pages that do not exist.
    """
    spec.check(cache)
    library = _library()
    if library is None:
        return attend_ref(cache, q_TQD, batch, spec).to(q_TQD.dtype)
    query_heads, head_dim = q_TQD.shape[1:]
    if head_dim != cache.layout.head_dim or query_heads % cache.layout.kv_heads:
        raise ValueError(
            f"queries {tuple(q_TQD.shape)} do not fit pages of {cache.layout.kv_heads} kv heads "
            f"and head_dim {cache.layout.head_dim}"
        )
    rows_TQD = _dense_rows(q_TQD)
    out_TQD = torch.zeros(q_TQD.shape, dtype=rows_TQD.dtype)
    query_start, kv_tokens, page_table = (
        x.to(torch.int32).contiguous() for x in (batch.query_start_S1, batch.kv_tokens_S, batch.page_table_SM)
    )
    native = _Cache.of(cache)
    sequences = _Batch(
        query_start.data_ptr(),
        kv_tokens.data_ptr(),
        page_table.data_ptr(),
        page_table.shape[1],
        batch.sequences,
    )
    rows, how = _Rows.of(rows_TQD), _Spec(spec.scale, spec.softcap or 0.0, spec.window or 0)
    threads = torch.get_num_threads()
    if not library.quire_attend(
        byref(native), byref(rows), out_TQD.data_ptr(), byref(sequences), byref(how), threads
    ):
        raise IndexError(
            f"query_start {query_start.tolist()} and kv_tokens {kv_tokens.tolist()} of the batch do not fit "
            f"{q_TQD.shape[0]} query rows and {cache.pool_NB.shape[0]} pages: a sequence has at most as many "
            "query rows as tokens in its pages, and its page table names a page for each of these"
        )
    return out_TQD.to(q_TQD.dtype)


def copy_pages(
    pool_NB: Tensor,
    pages_M: Tensor,
    bytes_MB: Tensor,
    sum_M: Tensor | None,
    *,
    scatter: bool,
) -> bool:
    """Copy between pages of a pool, with any stride, and contiguous bytes, by the calling thread alone.

    Checksums are added to `sum_M` if there is one. False where no C++ compiler is found: nothing was done.
    """
    library = _library()
    if library is None:
        return False
    pages_M = pages_M.to(torch.int64).contiguous()
    if pages_M.numel() and not 0 <= int(pages_M.min()) <= int(pages_M.max()) < pool_NB.shape[0]:
        raise IndexError(f"pages {pages_M.tolist()} are not all in a pool of {pool_NB.shape[0]}")
    library.quire_copy_pages(
        pool_NB.data_ptr(), pool_NB.stride(0), pages_M.data_ptr(), len(pages_M), bytes_MB.shape[1],
        bytes_MB.data_ptr(), scatter,
        None if sum_M is None else sum_M.data_ptr(), 0 if sum_M is None else sum_M.stride(0),
    )  # fmt: skip
    return True


def checksum_pages(bytes_MB: Tensor) -> Tensor | None:
    """Run `page_copy.checksum_pages` by the calling thread alone; None where no C++ compiler is found."""
    library = _library()
    if library is None:
        return None
    sum_M = torch.empty(bytes_MB.shape[0], dtype=torch.int64)
    library.quire_checksum_pages(bytes_MB.data_ptr(), *bytes_MB.shape, sum_M.data_ptr())
    return sum_M


def _dense_rows(x_THD: Tensor) -> Tensor:
    """Convert to a type that the C++ reads, with a dense last axis; other strides are passed on."""
    if x_THD.dtype not in (torch.float32, torch.bfloat16):
        x_THD = x_THD.float()
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


# ---- the structures of cpu.cpp --------------------------------------------------------------------------


class _Side(Structure):
    _fields_ = (
        ("shift_HD", c_void_p),
        ("scale_HD", c_void_p),
        ("codes_at", c_int64),
        ("scales_at", c_int64),
        ("codes", c_int32),
        ("groups", c_int32),
        ("rotate", c_int32),
        ("transposed", c_int32),
    )

    @classmethod
    def of(
        cls, head_dim: int, fmt: KVFormat, how: SideTransform, codes_at: int, scales_at: int, *, value: bool
    ) -> _Side:
        return cls(
            _address(how.shift_HD),
            _address(how.scale_HD),
            codes_at,
            scales_at,
            _CODES[fmt.codes],
            fmt.groups(head_dim),
            how.rotate,
            value and fmt.codes.quantized,
        )


class _Cache(Structure):
    _fields_ = (
        ("pool", c_void_p),
        ("pages", c_int64),
        ("page_bytes", c_int64),
        ("head_bytes", c_int64),
        ("heads", c_int32),
        ("head_dim", c_int32),
        ("page_tokens", c_int32),
        ("k", _Side),
        ("v", _Side),
    )

    @classmethod
    def of(cls, cache: LayerCache) -> _Cache:
        layout, cell, fmt = cache.layout, cache.cell, cache.format
        if layout.head_dim > _MAX_HEAD_DIM:
            raise FormatError(
                f"head_dim {layout.head_dim} exceeds the {_MAX_HEAD_DIM} that the CPU path serves"
            )
        return cls(
            cache.pool_NB.data_ptr(),
            cache.pool_NB.shape[0],
            layout.page_bytes,
            layout.head_bytes,
            layout.kv_heads,
            layout.head_dim,
            layout.page_tokens,
            _Side.of(layout.head_dim, fmt.k, cache.k_transform, cell.k_codes, cell.k_scales, value=False),
            _Side.of(layout.head_dim, fmt.v, cache.v_transform, cell.v_codes, cell.v_scales, value=True),
        )


class _Rows(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("tokens", c_int64),
        ("heads", c_int32),
        ("is_bf16", c_int32),
    )

    @classmethod
    def of(cls, x_THD: Tensor) -> _Rows:
        token_stride, head_stride, _ = x_THD.stride()
        tokens, heads, _ = x_THD.shape
        return cls(x_THD.data_ptr(), token_stride, head_stride, tokens, heads, x_THD.dtype is torch.bfloat16)


class _Batch(Structure):
    _fields_ = (
        ("query_start", c_void_p),
        ("kv_tokens", c_void_p),
        ("page_table", c_void_p),
        ("table_stride", c_int64),
        ("sequences", c_int64),
    )


class _Spec(Structure):
    _fields_ = (("scale", c_float), ("softcap", c_float), ("window", c_int64))


def _address(x_HD: Tensor | None) -> int | None:
    if x_HD is None:
        return None
    if x_HD.dtype is not torch.float32 or not x_HD.is_contiguous() or x_HD.device.type != "cpu":
        raise ValueError(
            f"a static transform's tensors are contiguous fp32 on the pool's device, got {x_HD.dtype}"
        )
    return x_HD.data_ptr()


# ---- building and loading -------------------------------------------------------------------------------


@once
def _library() -> ctypes.CDLL | None:
    """Load the compiled cpu.cpp; None, with one warning in the log, where it cannot be built."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        _LOG.warning("no C++ compiler (g++) found: attention on this CPU runs the slow reference")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        _LOG.warning("cannot build cpu.cpp: attention on this CPU runs the slow reference: %s", said)
        return None
    _LOG.info("attention on this CPU runs %s", library._name)
    library.quire_write.argtypes = [
        POINTER(_Cache), POINTER(_Rows), POINTER(_Rows), c_void_p, c_int64, c_int,
    ]  # fmt: skip
    library.quire_attend.argtypes = [
        POINTER(_Cache), POINTER(_Rows), c_void_p, POINTER(_Batch), POINTER(_Spec), c_int,
    ]  # fmt: skip
    library.quire_copy_pages.argtypes = [
        c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_bool, c_void_p, c_int64,
    ]  # fmt: skip
    library.quire_checksum_pages.argtypes = [c_void_p, c_int64, c_int64, c_void_p]
    library.quire_write.restype = library.quire_attend.restype = c_bool
    library.quire_copy_pages.restype = library.quire_checksum_pages.restype = None
    return library


def _compiled(compiler: str) -> Path:
    """Find the shared object for this source, compiler and CPU in the user's cache, or build it there.

    Raises OSError or CalledProcessError (with the compiler's output) if that fails.
    """
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    macros = _run(compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull)  # names compiler and CPU features
    text = "".join([*_FLAGS, macros, *(path.read_text() for path in sources)])
    key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    folder = _cache_folder()
    built = folder / f"cpu-{key}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=folder) as building:
            partial = Path(building, built.name)
            _run(compiler, *_FLAGS, "-Wno-psabi", "-shared", "-fPIC", "-o", str(partial), str(sources[0]))
            partial.replace(built)  # atomic: several processes may build at once
    return built


def _cache_folder() -> Path:
    """Find a folder for builds that this user alone can write to, because its files are executed.

    Raises OSError if there is no such place.
    """
    for folder in (Path.home() / ".cache" / "quire", Path(tempfile.gettempdir(), f"quire-{os.getuid()}")):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
                return folder
    raise OSError(f"neither {Path.home() / '.cache'} nor {tempfile.gettempdir()} can be written to")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
