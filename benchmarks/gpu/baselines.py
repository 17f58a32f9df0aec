"""Decode attention of libraries that may be there: each is timed if it can be, or its absence is said.

FlexAttention compiles for every shape and FlashInfer builds its kernels at first use: seconds each, which
only `SHAPES` are worth. Pages of the others hold 16 tokens, their own usual size.

Legend: see `cases.py`; N pages, P tokens of a page.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.gpu.cases import Shape
from benchmarks.gpu.timing import graph_seconds

SHAPES = (Shape(B=32, L=8192), Shape(B=1, L=131072))
_PAGE_TOKENS = 16
_WORKSPACE_BYTES = 256 << 20
_VLLM = ("vllm.v1.attention.ops.triton_unified_attention", "vllm.attention.ops.triton_unified_attention")
_VLLM_PROGRAMS = 128
"""Below this many programs vLLM splits a sequence, into `_VLLM_SEGMENTS`."""
_VLLM_SEGMENTS = 16

Calls = list[Callable[[], object]]


def optional_seconds(shape: Shape) -> dict[str, float]:
    """Seconds of one layer by library and type; of those that can be had, on random numbers."""
    if shape not in SHAPES:
        return {}
    makers: Mapping[str, Callable[[], Calls]] = {
        "flex bf16": lambda: flex_calls(shape, "cuda"),
        "flashinfer bf16": lambda: _flashinfer_calls(shape, torch.bfloat16),
        "flashinfer fp8": lambda: _flashinfer_calls(shape, torch.float8_e4m3fn),
        "vllm triton bf16": lambda: _vllm_calls(shape),
    }
    times = {}
    for name, make in makers.items():
        try:
            times[name] = graph_seconds(make())
        except Exception as error:  # others' code: whatever it raises ends its own line only
            reason = str(error).strip().splitlines() or [""]
            print(f"library {name} is left out: {type(error).__name__}: {reason[0]}", flush=True)
    return times


def flex_calls(shape: Shape, device: str) -> Calls:
    """FlexAttention on contiguous K and V."""
    q_BQRD = _random((shape.B, shape.H * shape.G, shape.rows, shape.D), device)
    attend = torch.compile(flex_attention, dynamic=False)

    def call(k_BHLD: Tensor, v_BHLD: Tensor) -> Callable[[], object]:
        return lambda: attend(q_BQRD, k_BHLD, v_BHLD, enable_gqa=shape.G > 1)

    layers = shape.layers("bf16")
    return [call(*_random((2, shape.B, shape.H, shape.L, shape.D), device)) for _ in range(layers)]


def _flashinfer_calls(shape: Shape, dtype: torch.dtype) -> Calls:
    flashinfer = importlib.import_module("flashinfer")
    q_BQD = _random((shape.B, shape.H * shape.G, shape.D))
    pages = shape.L // _PAGE_TOKENS
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True
    )
    wrapper.plan(
        torch.arange(shape.B + 1, dtype=torch.int32, device="cuda") * pages,
        torch.randperm(shape.B * pages, device="cuda").int(),
        torch.full((shape.B,), _PAGE_TOKENS, dtype=torch.int32, device="cuda"),
        shape.H * shape.G,
        shape.H,
        shape.D,
        _PAGE_TOKENS,
        q_data_type=torch.bfloat16,
        kv_data_type=dtype,
    )

    def call(kv_N2PHD: Tensor) -> Callable[[], object]:
        return lambda: wrapper.run(q_BQD, kv_N2PHD)

    cache = (shape.B * pages, 2, _PAGE_TOKENS, shape.H, shape.D)
    return [call(_random(cache).to(dtype)) for _ in range(shape.layers("bf16"))]


def _vllm_calls(shape: Shape) -> Calls:
    """vLLM's Triton kernel, set up as its own backend does."""
    attend = _first_module(_VLLM).unified_attention
    query_heads, pages = shape.H * shape.G, shape.L // _PAGE_TOKENS
    q_BQD = _random((shape.B, query_heads, shape.D))
    table_BM = torch.randperm(shape.B * pages, device="cuda").int().view(shape.B, pages)
    scale = torch.ones(shape.B, shape.H, device="cuda")
    segments = torch.empty(shape.B, query_heads, _VLLM_SEGMENTS, device="cuda")
    common = {
        "out": torch.empty_like(q_BQD),
        "cu_seqlens_q": torch.arange(shape.B + 1, dtype=torch.int32, device="cuda"),
        "max_seqlen_q": 1,
        "seqused_k": torch.full((shape.B,), shape.L, dtype=torch.int32, device="cuda"),
        "max_seqlen_k": shape.L,
        "softmax_scale": shape.spec.scale,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": table_BM,
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": scale,
        "v_descale": scale,
        "seq_threshold_3D": _VLLM_PROGRAMS // shape.H,
        "num_par_softmax_segments": _VLLM_SEGMENTS,
        "softmax_segm_output": q_BQD.new_empty(
            shape.B, query_heads, _VLLM_SEGMENTS, shape.D, dtype=torch.float32
        ),
        "softmax_segm_max": segments,
        "softmax_segm_expsum": torch.empty_like(segments),
    }

    def call(k_NPHD: Tensor, v_NPHD: Tensor) -> Callable[[], object]:
        return lambda: attend(q=q_BQD, k=k_NPHD, v=v_NPHD, **common)

    cache = (2, shape.B * pages, _PAGE_TOKENS, shape.H, shape.D)
    return [call(*_random(cache)) for _ in range(shape.layers("bf16"))]


def _first_module(names: tuple[str, ...]):  # type: ignore[no-untyped-def]
    """The first of the modules that can be imported; raises what the last one raises."""
    for name in names[:-1]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return importlib.import_module(names[-1])


def _random(shape: tuple[int, ...], device: str = "cuda") -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)
