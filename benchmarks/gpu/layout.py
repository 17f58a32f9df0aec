"""Page-major against layer-major: decode on a pool of 80 GB and more, random page tables.

    python -m benchmarks.gpu layout --date 2026-01-31

The kernels are the same and so are the cells; only the strides between them differ.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.cases import Paged, Shape
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import graph_seconds
from benchmarks.rows import Row
from quire.kernels.formats import layer_formats
from quire.kernels.layout import PageLayout

LAYERS = 32
_POOL_BYTES = 84 * 10**9
CASES = tuple(
    (Shape(B=32, L=8192, page_tokens=page_tokens), policy)
    for page_tokens in (64, 32)
    for policy in ("bf16", "int8", "int4")
)


def measure(ceilings: Ceilings) -> list[Row]:
    rows: list[Row] = []
    for shape, policy in CASES:
        pages = (
            _POOL_BYTES
            // PageLayout(layer_formats(policy, LAYERS), shape.H, shape.D, shape.page_tokens).page_bytes
        )
        seconds = {}
        for order in ("page-major", "layer-major"):
            seconds[order] = _decode_seconds(shape, policy, pages, order == "layer-major")
        ratio = seconds["page-major"] / seconds["layer-major"]
        rate = shape.kv_bytes(policy) / seconds["page-major"]
        case = f"layout {policy} {shape} pool={_POOL_BYTES / 1e9:.0f}GB"
        rows += [
            Row(case, "time", seconds["page-major"] * 1e3, "ms", "layer-major pool", ratio),
            Row(case, "bandwidth", rate / 1e9, "GB/s", "device copy", rate / ceilings.copy_bytes_s),
        ]
        print(
            f"{case}: page-major {seconds['page-major'] * 1e6:.1f} us = {ratio:.3f} x layer-major, "
            f"{rate / ceilings.copy_bytes_s:.0%} of copy",
            flush=True,
        )
    return rows


def _decode_seconds(shape: Shape, policy: str, pages: int, layer_major: bool) -> float:
    """Of one layer. Pools of this size do not fit beside each other: what the last one left goes first."""
    torch.cuda.empty_cache()
    paged = Paged.random(shape, policy, LAYERS, pages=pages, layer_major=layer_major)
    return graph_seconds(paged.decode_calls())
