"""Writing a step's K and V into pages: time, its share of the decode step it belongs to, and what Q's
transform costs in a launch of its own.

python -m benchmarks.gpu write --date 2026-01-31
"""

from __future__ import annotations

import torch

from benchmarks.gpu.attention import decode_seconds
from benchmarks.gpu.cases import Paged, Shape
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import graph_seconds
from benchmarks.rows import Row
from quire.kernels.write import write_kv

POLICIES = ("bf16", "fp8", "int8", "int4")
_DECODE = Shape(B=64, L=8192)
_PROMPT_TOKENS = 8192
_STEPS = (Shape(B=1, L=8192), Shape(B=32, L=1024), Shape(B=32, L=8192))
_WEIGHT_BYTES_A_LAYER = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
"""bf16 weights that a decode step of an 8B model (Llama-3.1-8B's shape) reads in each layer."""


def measure(ceilings: Ceilings) -> list[Row]:
    rows: list[Row] = []
    for policy in POLICIES:
        step_s = decode_seconds(_DECODE, policy) + _WEIGHT_BYTES_A_LAYER / ceilings.copy_bytes_s
        small_s = write_seconds(policy, _DECODE.B)
        large_s = write_seconds(policy, _PROMPT_TOKENS)
        moved = 2 * _PROMPT_TOKENS * _DECODE.H * _DECODE.D * 2 + Shape(B=1, L=_PROMPT_TOKENS).kv_bytes(policy)
        share = moved / large_s / ceilings.copy_bytes_s
        rows += [
            Row(
                f"write {policy} T={_DECODE.B}", "time", small_s * 1e3, "ms", "decode step", small_s / step_s
            ),
            Row(f"write {policy} T={_PROMPT_TOKENS}", "time", large_s * 1e3, "ms", "device copy", 1 / share),
        ]
        print(
            f"write {policy}: {_DECODE.B} tokens {small_s * 1e6:.1f} us = {small_s / step_s:.1%} of the "
            f"layer's decode step, {_PROMPT_TOKENS} tokens {large_s * 1e6:.1f} us = {share:.0%} of copy",
            flush=True,
        )
    return rows + [step_row("int4", shape) for shape in _STEPS]


def step_row(policy: str, shape: Shape) -> Row:
    """One layer's write and attention with the queries transformed by the write, against by themselves."""
    paged = Paged.random(shape, policy, shape.layers(policy))
    apart_s, together_s = (graph_seconds(paged.step_calls(together=t)) for t in (False, True))
    print(
        f"write and decode {policy} {shape}: {together_s * 1e6:.1f} us, {apart_s * 1e6:.1f} with Q apart",
        flush=True,
    )
    case = f"write and decode {policy} {shape}"
    return Row(case, "time", together_s * 1e3, "ms", "Q in a launch of its own", together_s / apart_s)


def write_seconds(policy: str, tokens: int) -> float:
    """One layer's write. Tokens of a decode step go to pages of their own; a prompt fills pages."""
    sequences = tokens if tokens == _DECODE.B else 1
    shape = Shape(B=sequences, L=64 if sequences > 1 else tokens, rows=tokens // sequences)
    paged = Paged.random(shape, policy, 32)
    slots_T = torch.randperm(sequences, device="cuda") * 64 + 5 if sequences > 1 else paged.batch.slots_T
    k_THD, v_THD = torch.randn(2, tokens, shape.H, shape.D, dtype=torch.bfloat16, device="cuda")
    return graph_seconds([lambda c=c: write_kv(c, k_THD, v_THD, slots_T) for c in paged.caches])  # type: ignore[misc]
