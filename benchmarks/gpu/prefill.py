"""Prefill attention of a chunk over quantized history, against the best library attention on bf16 K and V.

    python -m benchmarks.gpu prefill --date 2026-01-31

Three ways are timed: over dequantized pages by the library's attention, the paged kernel, and what
`prefill_attention` chooses. The baseline computes the same rows from contiguous bf16: torch's flash attention
with a causal mask aligned to the end, or cuDNN in two calls (history, chunk) whose merging is not counted;
the faster one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.cases import Paged, Shape
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import graph_seconds
from benchmarks.rows import Row
from quire.kernels.prefill import launch_prefill, prefill_attention
from quire.kernels.prefill_library import attend_dequantized, library_attention

CHUNKS = (
    (8192, (0, 8192, 16384, 32768, 65536)),
    (2048, (0, 16384, 65536)),
    (2000, (14001,)),
    (512, (0, 16384)),
)
POLICIES = ("bf16", "int8", "int4")


def measure(ceilings: Ceilings) -> list[Row]:
    rows: list[Row] = []
    for new, histories in CHUNKS:
        for history in histories:
            shape = Shape(B=1, L=history + new, rows=new)
            library, library_s = best_library_seconds(shape)
            rows += [
                row for policy in POLICIES for row in _compare(shape, policy, library, library_s, ceilings)
            ]
    return rows


def _compare(shape: Shape, policy: str, library: str, library_s: float, ceilings: Ceilings) -> list[Row]:
    paged = Paged.random(shape, policy, 1)
    arguments = paged.caches[0], paged.q_TQD, paged.batch, shape.spec
    ways = {"chosen": prefill_attention, "paged": launch_prefill, "library": attend_dequantized}
    seconds = {name: graph_seconds([lambda w=way: w(*arguments)]) for name, way in ways.items()}  # type: ignore[misc]
    flop = 4 * shape.H * shape.G * shape.D * shape.rows * (shape.L - shape.rows / 2)
    case = f"prefill {policy} {shape}"
    rate = flop / seconds["chosen"]
    print(
        f"{case}: chosen {seconds['chosen'] * 1e3:.3f} ms = {seconds['chosen'] / library_s:.2f} x {library} "
        f"({library_s * 1e3:.3f} ms), {rate / 1e12:.0f} TFLOP/s = {rate / ceilings.matmul_flop_s:.0%} of "
        "matmul; "
        f"paged {seconds['paged'] * 1e3:.3f} ms, library {seconds['library'] * 1e3:.3f} ms",
        flush=True,
    )
    return [
        Row(case, "time", seconds["chosen"] * 1e3, "ms", library, seconds["chosen"] / library_s),
        Row(case, "rate", rate / 1e12, "TFLOP/s", "bf16 matmul", rate / ceilings.matmul_flop_s),
        Row(case, "paged time", seconds["paged"] * 1e3, "ms", library, seconds["paged"] / library_s),
        Row(case, "library time", seconds["library"] * 1e3, "ms", library, seconds["library"] / library_s),
    ]


def best_library_seconds(shape: Shape) -> tuple[str, float]:
    q_LQD = torch.randn(shape.rows, shape.H * shape.G, shape.D, dtype=torch.bfloat16, device="cuda")
    k_HLD, v_HLD = torch.randn(2, shape.H, shape.L, shape.D, dtype=torch.bfloat16, device="cuda")
    times = {
        "flash bf16": graph_seconds([lambda: _flash(q_LQD, k_HLD, v_HLD)]),
        "cudnn bf16, unmerged": graph_seconds([lambda: _cudnn(q_LQD, k_HLD, v_HLD, shape)]),
    }
    print(
        f"library {shape}: " + ", ".join(f"{name} {s * 1e3:.3f} ms" for name, s in times.items()), flush=True
    )
    return min(times.items(), key=lambda item: item[1])


def _flash(q_LQD: Tensor, k_HLD: Tensor, v_HLD: Tensor) -> Tensor:
    bias = causal_lower_right(q_LQD.shape[0], k_HLD.shape[1])
    return scaled_dot_product_attention(
        q_LQD.transpose(0, 1)[None], k_HLD[None], v_HLD[None], attn_mask=bias, enable_gqa=True
    )


def _cudnn(q_LQD: Tensor, k_HLD: Tensor, v_HLD: Tensor, shape: Shape) -> None:
    history = shape.L - shape.rows
    scale = shape.spec.scale
    library_attention(q_LQD, k_HLD[:, history:], v_HLD[:, history:], scale, True)
    if history:
        library_attention(q_LQD, k_HLD[:, :history], v_HLD[:, :history], scale, False)
